"""Every op timed on a GPU beside its floor: what the first person with a device runs, and what everybody runs after.

One layer of OFA-base per line, at the shapes that `roofline` counts. Several input sets are used in turn, and caches
are flushed between calls, so that no answer comes from a cache that a server would not have warm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch

from promptmux_kernels.bench import roofline
from promptmux_kernels.triton_ops import samples
from promptmux_kernels.triton_ops.samples import Call, Widths
from promptmux_kernels.triton_ops.tuner import gpu_milliseconds

INPUT_SETS = 3


class NoGpu(RuntimeError):
    """There is nothing to time on."""


@dataclass(frozen=True)
class Timing:
    """One op of one layer for a whole batch."""

    op: str
    batch: int
    measured_us: float
    floor_us: float

    @property
    def over_floor(self) -> float:
        return self.measured_us / self.floor_us


def timings(batches: tuple[int, ...] = (1, 8, 32), machine: roofline.Machine = roofline.H100) -> Iterator[Timing]:
    if not torch.cuda.is_available():
        raise NoGpu("no GPU is visible to torch: kernels can be compiled and counted here, not timed")
    load, model = roofline.Load(), roofline.BASE
    widths = Widths(model.heads, model.d_model // model.heads, model.ffn_dim, torch.bfloat16, torch.device("cuda"))
    for batch in batches:
        floors = {cost.op: machine.floor_us(cost) for cost in per_layer(model, load, batch)}
        for op, make in _CALLS.items():
            sets = cycle([make(widths, load, batch) for _ in range(INPUT_SETS)])
            measured = gpu_milliseconds(lambda sets=sets: next(sets)()) * 1e3  # type: ignore[misc]
            yield Timing(op, batch, measured, floors[op])


def per_layer(model: roofline.Model, load: roofline.Load, batch: int) -> list[roofline.Cost]:
    """The ops' costs in one layer; a step's ops carry the names that `_CALLS` gives them."""
    prefill = {cost.op: cost for cost in roofline.prefill(model, load, batch)}
    step = {cost.op: cost for cost in roofline.decode_step(model, load, batch)}
    joined = step["norm_add_norm"]
    return [
        *(_share(prefill[op], op, model.layers) for op in ("prefix_attention", "norm_add_norm", "gelu_norm")),
        *(
            _share(step[op], op, model.layers)
            for op in ("prefix_decode_attention", "cross_decode_attention", "write_cache")
        ),
        _share(joined, "norm_add_norm, step", 2 * model.layers),
        _share(step["gelu_norm"], "gelu_norm, step", model.layers),
    ]


def _share(cost: roofline.Cost, name: str, times: int) -> roofline.Cost:
    return roofline.Cost(name, cost.flops / times, cost.bytes / times)


Make = Callable[[Widths, roofline.Load, int], Call]

_CALLS: dict[str, Make] = {
    "prefix_attention": lambda w, load, n: samples.encoder_attention(w, [load.tokens] * n, [load.prompt] * n),
    "norm_add_norm": lambda w, load, n: samples.join_branches(w, load.tokens * n),
    "gelu_norm": lambda w, load, n: samples.feed_forward_norm(w, load.tokens * n),
    "prefix_decode_attention": lambda w, load, n: samples.decode_step(
        w, n, load.beams, load.steps // 2, [load.prompt] * n
    ),
    "cross_decode_attention": lambda w, load, n: samples.cross_step(w, [load.tokens] * n, load.beams, load.steps // 2),
    "write_cache": lambda w, load, n: samples.store_tokens(w, load.beams * n),
    "norm_add_norm, step": lambda w, load, n: samples.join_branches(w, load.beams * n),
    "gelu_norm, step": lambda w, load, n: samples.feed_forward_norm(w, load.beams * n),
}
