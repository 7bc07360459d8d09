"""`promptmux serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from promptmux_server.cli.machine import restart_tuned
from promptmux_server.cli.output import fail


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `promptmux serve --port 8000 --backbone pocket --prompts my-prompts`")(serve)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default 8000.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Backbone directory, or `pocket`.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Directory of prompt files; default: the shipped ones.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Loopback port of /metrics; default 8001.")] = None,
) -> None:
    """Serve every task of a prompt directory on one backbone. Other settings: environment variables PROMPTMUX_*."""
    from pydantic import ValidationError

    from promptmux_server.settings import Settings, unknown_variables

    if unknown := unknown_variables(os.environ):
        fail(f"unknown settings in the environment: {', '.join(unknown)}")

    given: dict[str, Any] = {
        "host": host, "port": port, "backbone": backbone, "prompts": prompts, "dtype": dtype,
        "metrics_port": metrics_port,
    }  # fmt: skip
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        fail("; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors()))

    restart_tuned()
    from promptmux_server.api.keys import KeyFileError
    from promptmux_server.cli.process import run_server
    from promptmux_server.errors import PromptmuxError

    try:
        run_server(settings)
    except PromptmuxError as error:
        fail(error.message)
    except (KeyFileError, PermissionError) as error:
        fail(str(error))
