"""`promptmux bench cpu`: the CPU path beside the machine's own rates and the released form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptmux_server.cli.machine import ALLOCATOR_VARIABLE, restart_tuned, usable_cores
from promptmux_server.cli.output import JsonOption, fail, print_json, print_table

if TYPE_CHECKING:
    from promptmux_server.bench.cpu import CpuBench, Released, Row


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `promptmux bench cpu --json`")(cpu)


def cpu(
    size: Annotated[str, typer.Option(help="OFA's size; weights are random.")] = "base",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    batch: Annotated[int, typer.Option(help="Requests in a batch.", min=1)] = 8,
    threads: Annotated[int | None, typer.Option(help="Threads; default: usable cores.")] = None,
    shipped: Annotated[bool, typer.Option(help="Compare with the default allocator too, in a second process.")] = True,
    pixels: Annotated[int, typer.Option(help="Side of the pictures.", hidden=True)] = 480,
    quick: Annotated[bool, typer.Option(help="One sample of everything.", hidden=True)] = False,
    released_only: Annotated[bool, typer.Option(help="Time the released form alone.", hidden=True)] = False,
    as_json: JsonOption = False,
) -> None:
    """Time every op and stage on random weights; ratios are within this run. Takes minutes."""
    restart_tuned()
    import torch

    from promptmux_server.backbone.assemble import serving_dtype
    from promptmux_server.backbone.sizes import OFA_SIZES
    from promptmux_server.bench.cpu import CpuBench

    if size not in OFA_SIZES or dtype not in ("auto", "bfloat16", "float32"):
        fail(f"there is no size {size!r} or element type {dtype!r}")
    torch.set_num_threads(threads or usable_cores())
    chosen = serving_dtype("cpu") if dtype == "auto" else getattr(torch, dtype)
    with torch.no_grad():
        bench = CpuBench(OFA_SIZES[size], chosen, batch=batch, pixels=pixels, quick=quick)
        if released_only:
            typer.echo(json.dumps(asdict(bench.released())))
            return
        released = bench.released()
        default = _released_as_shipped() if shipped else None
        rows = list(bench.rows(released, default))
    machine = _machine(bench)
    if as_json:
        print_json({**machine, "rows": [asdict(row) for row in rows]})
    else:
        print_table(("", ""), [(name, str(value)) for name, value in machine.items()])
        print_table(COLUMNS, [_cells(row) for row in rows])


COLUMNS = ("op", "ms", "GFLOP/s", "of G", "x released", "x as shipped", "max error", "target", "")


def _cells(row: Row) -> tuple[str, ...]:
    """Numbers as people read them; an asterisk where the machine was busy while they were taken."""
    return (
        row.op,
        f"{row.ms:.2f}{'' if row.clean else '*'}",
        _number(row.gflops, ".0f"),
        _number(row.share_of_gemm, ".2f"),
        _number(row.ratio_tuned, ".2f"),
        _number(row.ratio_shipped, ".2f"),
        _number(row.error, ".1e"),
        row.target,
        {None: "", True: "met", False: "missed"}[row.met],
    )


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _machine(bench: CpuBench) -> dict[str, Any]:
    import torch

    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", "unknown"),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "backbone": bench.config.name,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "gemm_gflops": round(bench.gemm_gflops, 1),
        "bandwidth_gbs": round(bench.bandwidth_gbs, 1),
        "allocator": os.environ.get(ALLOCATOR_VARIABLE, "default"),
    }


def _released_as_shipped() -> Released:
    """The released form's times in a process with the default allocator: the same command, its settings emptied."""
    from promptmux_server.bench.clock import Timing
    from promptmux_server.bench.cpu import Released

    command = [sys.executable, *sys.orig_argv[1:], "--released-only"]
    environment = {**os.environ, ALLOCATOR_VARIABLE: ""}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        fail("the process with the default allocator failed; see above")
    return Released(**{name: Timing(**timing) for name, timing in json.loads(done.stdout).items()})
