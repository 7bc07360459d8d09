"""The command line. Each command imports what it needs when it runs, so that `--help` needs no torch."""

from __future__ import annotations

import typer

from promptmux_server.cli import ask, bench, converting, data, job_commands, prompts, searching, serving, training

app = typer.Typer(
    name="promptmux",
    help="Many prompt-tuned tasks on one frozen multimodal backbone, in one batch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
serving.register(app)
ask.register(app)
prompts.register(app)
converting.register(app)
data.register(app)
training.register(app)
searching.register(app)
job_commands.register(app)
bench.register(app)
