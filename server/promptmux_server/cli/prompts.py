"""`promptmux prompts`: prompt files, and the prompts of a server."""

from __future__ import annotations

import typer

from promptmux_server.cli import prompt_files


def register(app: typer.Typer) -> None:
    prompts = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    prompt_files.register(prompts)
    app.add_typer(prompts, name="prompts", help="Import and inspect prompt files.")
