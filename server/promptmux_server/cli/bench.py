"""`promptmux bench`: one sub-command per kind of machine."""

from __future__ import annotations

import typer

from promptmux_server.cli import bench_cpu


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
    bench_cpu.register(bench)
    app.add_typer(bench, name="bench")
