"""`promptmux bench kernels`: the GPU kernels, compiled, counted and timed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promptmux_server.cli.output import JsonOption, fail, print_json, print_table

if TYPE_CHECKING:
    from promptmux_kernels.bench.roofline import Line
    from promptmux_kernels.bench.timing import Timing


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `promptmux bench kernels --compile`")(kernels)


def kernels(
    compile_: Annotated[bool, typer.Option("--compile", help="Compile for every target; needs no GPU.")] = False,
    target: Annotated[list[str] | None, typer.Option(help="Only this target; may be repeated.")] = None,
    document: Annotated[Path, typer.Option(help="Where --compile writes.")] = Path("docs/kernels-compiled.md"),
    as_json: JsonOption = False,
) -> None:
    """Time every op on the GPU beside its floor; without a GPU, print the floors.

    With --compile, compile every kernel for sm_80, sm_90, sm_100 and gfx942 instead, and write what became of it.
    """
    from importlib.util import find_spec

    if find_spec("triton") is None:
        fail("triton is not installed: pip install 'promptmux-server[gpu]'")
    if compile_:
        _compile(target, document, as_json)
    else:
        _time(as_json)


def _compile(targets: list[str] | None, document: Path, as_json: bool) -> None:
    from promptmux_kernels.bench import bars
    from promptmux_kernels.bench.compiled import TARGETS

    if unknown := set(targets or ()) - TARGETS.keys():
        fail(f"unknown target {', '.join(sorted(unknown))}: choose from {', '.join(TARGETS)}")
    entries = list(bars.compile_all(targets or tuple(TARGETS)))
    document.write_text(bars.document(entries), encoding="utf-8")
    faults = [f"{e.where} {e.case.name} {e.head_dim} {e.element}: {fault}" for e in entries for fault in bars.faults(e)]
    if as_json:
        print_json({"document": str(document), "kernels": len(entries), "faults": faults})
    else:
        typer.echo(f"{len(entries)} kernels compiled; {document} written")
    if faults:
        fail("; ".join(faults))


def _time(as_json: bool) -> None:
    from promptmux_kernels.bench import roofline, timing

    floors = roofline.table()
    try:
        timings = list(timing.timings())
    except timing.NoGpu as reason:
        typer.echo(str(reason), err=True)
        timings = []
    if as_json:
        print_json(
            {"floors": [_floor_fields(line) for line in floors], "timings": [_timing_fields(t) for t in timings]}
        )
        return
    print_table(
        ("model", "phase", "batch", "op", "GFLOP", "MB", "floor us", "floor us / request"),
        [
            (
                line.model,
                line.phase,
                str(line.batch),
                line.op,
                f"{line.gflop:.3g}",
                f"{line.megabytes:.3g}",
                f"{line.floor_us:.3g}",
                f"{line.floor_us_per_request:.3g}",
            )
            for line in floors
        ],
    )
    if timings:
        print_table(
            ("op, one layer of OFA-base", "batch", "us", "floor us", "measured / floor"),
            [(t.op, str(t.batch), f"{t.measured_us:.1f}", f"{t.floor_us:.1f}", f"{t.over_floor:.2f}") for t in timings],
        )


def _floor_fields(line: Line) -> dict[str, object]:
    return dataclasses.asdict(line) | {"floor_us_per_request": line.floor_us_per_request}


def _timing_fields(timing: Timing) -> dict[str, object]:
    return dataclasses.asdict(timing) | {"over_floor": timing.over_floor}
