"""`promptmux serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from promptmux_server.cli.machine import restart_tuned
from promptmux_server.cli.output import fail

FAULT_VARIABLE = "PROMPTMUX_FAULT"


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `promptmux serve --port 8000 --backbone pocket --prompts my-prompts`")(serve)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default 8000.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Backbone directory, or `pocket`.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Directory of prompt files; default: the shipped ones.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Loopback port of /metrics; default 8001.")] = None,
    allow_faults: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Serve every task of a prompt directory on one backbone. Other settings: environment variables PROMPTMUX_*."""
    from pydantic import ValidationError

    from promptmux_server.settings import Settings, unknown_variables

    if unknown := [name for name in unknown_variables(os.environ) if name != FAULT_VARIABLE]:
        fail(f"unknown settings in the environment: {', '.join(unknown)}")
    _arm_fault(os.environ.get(FAULT_VARIABLE), allow_faults)

    given: dict[str, Any] = {
        "host": host, "port": port, "backbone": backbone, "prompts": prompts, "dtype": dtype,
        "metrics_port": metrics_port,
    }  # fmt: skip
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        fail("; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors()))

    if settings.training_root is not None and not settings.training_root.is_dir():
        fail(f"there is no folder {settings.training_root} for trainings (PROMPTMUX_TRAINING_ROOT)")
    restart_tuned()
    from promptmux_prompts import StoreError
    from promptmux_server.api.keys import KeyFileError
    from promptmux_server.cli.process import run_server
    from promptmux_server.errors import PromptmuxError

    try:
        run_server(settings)
    except PromptmuxError as error:
        fail(error.message)
    except (KeyFileError, PermissionError, StoreError) as error:
        fail(str(error))


def _arm_fault(spec: str | None, allowed: bool) -> None:
    """Let the server die, fail or wait where a test wants it to; nobody else's server does."""
    if spec is None:
        return
    if not allowed:
        fail(f"{FAULT_VARIABLE} is for tests of this server; a server that is used does not start with it")
    from promptmux_prompts.faults import arm

    try:
        arm(spec)
    except ValueError as error:
        fail(f"{FAULT_VARIABLE}: {error}")
