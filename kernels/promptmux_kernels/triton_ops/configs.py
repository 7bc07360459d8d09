"""Tile sizes of the kernels: what may be tried where, and what is used.

The first candidate of a list is the default; the tuner may prefer another. All candidates for an op, head dim and type
share the number of keys per tile, so that a row's keys are added up in one order, whatever the batch around it.
Chosen by compiling (`docs/kernels-compiled.md`): no spills anywhere. Knows nothing of how a candidate is timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """One way to cut and compile a kernel; `descriptor` reads bias tables through the copy engine."""

    rows: int
    keys: int
    warps: int
    stages: int
    descriptor: bool = False


@dataclass(frozen=True)
class ShapeClass:
    """What a choice is made for; `long` sequences are those with a picture in them."""

    op: str
    head_dim: int
    element: str
    long: bool


LONG = 128
"""Tokens above which a sequence is long: texts stay below, the smallest picture in use (256 px) brings 256 patches."""

MERGE = Config(rows=1, keys=1, warps=4, stages=1)
"""The merge of split cross-attention: at most 32 x 128 numbers per program."""

_winners: dict[tuple[str, ShapeClass], Config] = {}
_forced: ContextVar[Config | None] = ContextVar("promptmux_kernels_config", default=None)
_target: ContextVar[str | None] = ContextVar("promptmux_kernels_target", default=None)


@contextmanager
def forced(config: Config) -> Iterator[None]:
    """Use this configuration inside the block, whatever the shape: for tuning and tests."""
    token = _forced.set(config)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def compiling_for(where: str) -> Iterator[None]:
    """Choose as that target would, inside the block: to compile for a device that is not here."""
    token = _target.set(where)
    try:
        yield
    finally:
        _target.reset(token)


def choose(op: str, x: Tensor, *, longest: int) -> Config:
    """The configuration for heads like x's (T, H, D) and sequences up to `longest` tokens."""
    if forced := _forced.get():
        return forced
    shape = ShapeClass(op, x.shape[-1], str(x.dtype).removeprefix("torch."), longest > LONG)
    where = _target.get() or target(x.device)
    return _winners.get((where, shape)) or candidates(where, shape)[0]


def prefer(where: str, winners: Mapping[ShapeClass, Config]) -> None:
    """Use these from now on in place of the defaults."""
    _winners.update({(where, shape): config for shape, config in winners.items()})


def target(device: torch.device) -> str:
    """The newest family of ours that the device can run; kernels on CPU tensors are interpreted."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    families = {9: "sm_90", 10: "sm_100", 11: "sm_100"}
    return families.get(major, "sm_80")  # sm_12x has an sm_89's shared memory and tensor instructions


def candidates(where: str, shape: ShapeClass) -> tuple[Config, ...]:
    """What may be tried for a shape on a target, the default first."""
    if where == "interpreter":
        return _INTERPRETED[shape.op]
    if shape.element == "float32":
        return _EXACT[shape.op]
    tables = _WIDE if shape.head_dim > 64 else _NARROW
    found = tables[shape.op].get(where, tables[shape.op]["others"])
    return found if shape.long else tuple(sorted(found, key=lambda config: config.rows))


_INTERPRETED = {
    "prefix_attention": (Config(64, 64, 4, 1),),
    "prefix_attention_factors": (Config(64, 64, 4, 1),),
    "prefix_decode_attention": (Config(16, 32, 4, 1),),
    "cross_decode_attention": (Config(16, 64, 4, 1),),
    "cross_prefill_attention": (Config(64, 64, 4, 1),),
}
"""Larger tiles than needed cost little: the interpreter's time goes by programs."""

_FMA = Config(32, 32, 4, 1)
_EXACT = {
    "prefix_attention": (_FMA,),
    "prefix_attention_factors": (Config(16, 32, 4, 1),),
    "prefix_decode_attention": (Config(16, 32, 4, 1),),
    "cross_decode_attention": (Config(16, 32, 4, 1),),
    "cross_prefill_attention": (_FMA,),
}
"""float32 runs on the plain units, to be exact: tiles are small so that nothing spills."""

_Lists = dict[str, tuple[Config, ...]]
"""Candidates by target, `others` for those not named."""

_DECODE: _Lists = {"others": (Config(16, 32, 4, 2), Config(16, 32, 2, 2)), "gfx942": (Config(16, 32, 4, 2),)}
_CROSS: _Lists = {
    "others": (Config(16, 64, 4, 3), Config(16, 64, 4, 4), Config(16, 64, 2, 3)),
    "gfx942": (Config(16, 64, 4, 4),),
}
_CROSS_PREFILL: _Lists = {"others": (Config(32, 64, 4, 2), Config(64, 64, 4, 2))}

_NARROW: dict[str, _Lists] = {
    "prefix_attention": {
        "sm_80": (Config(64, 64, 4, 2), Config(128, 64, 8, 2)),
        "sm_90": (Config(128, 64, 8, 2, True), Config(64, 64, 4, 2, True), Config(64, 64, 4, 2)),
        "sm_100": (Config(64, 64, 4, 2, True), Config(128, 64, 8, 2, True), Config(64, 64, 4, 2)),
        "others": (Config(64, 32, 4, 2),),  # gfx942 spills 64 keys beside a decoder's float32 biases
    },
    "prefix_attention_factors": {"others": (Config(64, 64, 4, 2),)},
    "prefix_decode_attention": _DECODE,
    "cross_decode_attention": _CROSS,
    "cross_prefill_attention": _CROSS_PREFILL,
}
_WIDE: dict[str, _Lists] = _NARROW | {
    "prefix_attention": {
        "sm_80": (Config(64, 64, 4, 2),),
        "sm_90": (Config(64, 64, 4, 2, True), Config(128, 64, 8, 2, True)),
        "sm_100": (Config(128, 64, 8, 2, True), Config(64, 64, 4, 2, True)),
        "others": (Config(64, 32, 4, 1),),
    },
    "prefix_attention_factors": {"others": (Config(64, 32, 4, 2),), "sm_100": (Config(64, 32, 8, 2),)},
    "cross_prefill_attention": _CROSS_PREFILL | {"gfx942": (Config(32, 64, 4, 1),)},
    "cross_decode_attention": {
        "others": (Config(16, 64, 4, 2), Config(16, 64, 4, 3)),
        "gfx942": (Config(16, 64, 4, 4),),
    },
}
"""Heads of 80 take 128 lanes: three stages of them leave an sm_80 room for one block."""
