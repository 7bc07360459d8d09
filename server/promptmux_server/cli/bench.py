"""`promptmux bench`: measurements that anybody can repeat, one command each."""

from __future__ import annotations

import typer

from promptmux_server.cli import bench_cpu, bench_kernels


def register(app: typer.Typer) -> None:
    bench = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    bench_cpu.register(bench)
    bench_kernels.register(bench)
    app.add_typer(bench, name="bench", help="Measure this machine, or count what one would need.")
