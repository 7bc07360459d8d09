"""What every compiled kernel must hold, and how it is told: bars, faults, the table in `docs/kernels-compiled.md`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import triton

from promptmux_kernels.bench.cases import EXACT, NARROW, WIDE, Case, cases
from promptmux_kernels.bench.compiled import DEVICES, TARGETS, Compiled, compile_launch
from promptmux_kernels.triton_ops.samples import Widths

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
"""The prefill's multiplication on each target. Tiles of 16 beams are too low for HGMMA and UTCHMMA: they use HMMA."""

PREFILL = ("prefix_attention", "prefix_attention, texts", "prefix_attention, factors")
TILED = (*PREFILL, "prefix_decode_attention", "cross_decode_attention", "cross_decode_attention, in parts")

SINGLE_BLOCK = {
    ("gfx942", 64): "factored biases are a second tile of float32 scores in the vector registers",
    ("gfx942", 80): "factored biases as at head dim 64, beside accumulators of 128 lanes",
    ("sm_100", 80): "128 lanes double the accumulators; 8 warps a block",
}
"""Why a prefill kernel may have only one block per processor: (target, head dim) -> reason."""


@dataclass(frozen=True)
class Entry:
    case: Case
    where: str
    compiled: Compiled

    @property
    def head_dim(self) -> int:
        return self.case.widths.head_dim

    @property
    def element(self) -> str:
        return str(self.case.widths.dtype).removeprefix("torch.")


def compile_all(targets: Iterable[str] = tuple(TARGETS)) -> Iterator[Entry]:
    """bfloat16 at both head sizes everywhere; float32, there to check answers, on sm_90 alone."""
    for where in targets:
        for widths in (NARROW, WIDE, *((EXACT,) if where == "sm_90" else ())):
            yield from compile_widths(where, widths)


def compile_widths(where: str, widths: Widths) -> Iterator[Entry]:
    for case in cases(where, widths):
        yield Entry(case, where, compile_launch(case.launch, where))


def faults(entry: Entry) -> list[str]:
    """Which bars an entry misses; none for a kernel that may be shipped."""
    compiled, name = entry.compiled, entry.case.name
    found = []
    if compiled.spills or compiled.stack_bytes:
        found.append(f"spills: {compiled.spills} instructions or values, {compiled.stack_bytes} bytes of stack")
    if compiled.shared_bytes > DEVICES[entry.where].shared_per_block:
        found.append(f"{compiled.shared_bytes} bytes of shared memory are more than a block may have")
    if compiled.blocks_per_processor < 2 and not _excused(entry):
        found.append("one block per processor, and no reason stated")
    if entry.case.widths.dtype == torch.bfloat16:
        found += _slow_instructions(entry, name)
    return found


def _excused(entry: Entry) -> bool:
    return entry.case.name.startswith("prefix_attention") and (entry.where, entry.head_dim) in SINGLE_BLOCK


def _slow_instructions(entry: Entry, name: str) -> list[str]:
    compiled, found = entry.compiled, []
    if name in PREFILL and not any(key.startswith(MATRIX[entry.where]) for key in compiled.matrix):
        found.append(f"no {MATRIX[entry.where]}")
    if name in PREFILL and entry.where != "gfx942" and not compiled.asynchronous:
        found.append("no asynchronous copies")
    if name in TILED and not any("128" in key or "x4" in key for key in (*compiled.asynchronous, *compiled.loads)):
        found.append("no loads of 16 bytes")
    return found


def document(entries: Iterable[Entry]) -> str:
    """The whole of `docs/kernels-compiled.md`."""
    lines = [
        "# Compiled kernels",
        "",
        f"Written by `promptmux bench kernels --compile` (triton {triton.__version__}; no GPU is needed). A line is",
        "a kernel in the default configuration of its target (query rows x keys, warps, pipeline stages; TMA: bias by",
        "tensor descriptor). Spills count LDL and STL instructions or spilled registers; shared memory is per block;",
        "blocks are how many one processor holds at once, by registers, warps and shared memory.",
        "",
    ]
    by_target: dict[str, list[Entry]] = {}
    for entry in entries:
        by_target.setdefault(entry.where, []).append(entry)
    for where, own in by_target.items():
        lines += [f"## {where}", "", _HEADER, _RULE, *(_line(entry) for entry in own), ""]
    lines += ["## Where one block fills a processor", ""]
    lines += [f"- {where}, head dim {dim}: {why}" for (where, dim), why in SINGLE_BLOCK.items()]
    return "\n".join(lines) + "\n"


_HEADER = (
    "| kernel | heads | configuration | registers | stack | spills | shared kB | blocks | matrix | async | loads |"
)
_RULE = "|---" * 11 + "|"


def _line(entry: Entry) -> str:
    compiled, config = entry.compiled, entry.case.launch.config
    tile = f"{config.rows}x{config.keys}, {config.warps}, {config.stages}{', TMA' if config.descriptor else ''}"
    cells = [
        entry.case.name,
        f"{entry.head_dim} {entry.element}",
        tile,
        compiled.registers,
        compiled.stack_bytes,
        compiled.spills,
        f"{compiled.shared_bytes / 1024:.1f}",
        compiled.blocks_per_processor,
        *(_mix(counts) for counts in (compiled.matrix, compiled.asynchronous, compiled.loads)),
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _mix(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "-"
