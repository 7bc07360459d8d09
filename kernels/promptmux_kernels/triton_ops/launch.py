"""How a kernel of ours is started, and what its arguments have in common. Knows no op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from promptmux_kernels.triton_ops.configs import Config

_ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_recorded: ContextVar[list[Launch] | None] = ContextVar("promptmux_kernels_launches", default=None)

_counted: ContextVar[int | None] = ContextVar("promptmux_kernels_processors", default=None)


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: what it would compile for, with which arguments, by their names."""

    kernel: Any
    grid: tuple[int, ...]
    config: Config
    arguments: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Note launches instead of running them, so that what compiles without a device is what would run on one."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def run(kernel: Any, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
    if (launches := _recorded.get()) is not None:
        launches.append(Launch(kernel, grid, config, arguments))
        return
    if config.descriptor and torch.cuda.is_available():
        triton.set_allocator(_scratch)
    with on(next(x.device for x in arguments.values() if isinstance(x, Tensor))):
        # Said aloud because the default flips in triton 3.10, and with it the last bit of every score.
        kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make this the current device: triton starts kernels there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel builds its tensor descriptors: 128 bytes per program, aligned as torch aligns everything."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def element(dtype: torch.dtype) -> tl.dtype:
    return _ELEMENTS[dtype]


def lanes(x: Tensor) -> int:
    """Head dim padded to what a tile may have: a power of two, at least 16."""
    padded: int = triton.next_power_of_2(x.shape[-1])
    return max(16, padded)


def by_heads(x: Tensor) -> Tensor:
    """(T, H, D) with heads and lanes contiguous; tokens may lie further apart, as in a fused projection."""
    return x if is_by_heads(x) else x.contiguous()


def is_by_heads(x: Tensor) -> bool:
    return lies_along_lines(x) and (x.shape[1] == 1 or x.stride(1) == x.shape[2])


def lies_along_lines(x: Tensor) -> bool:
    """Whether elements of the last axis lie next to one another; of an axis of one, the stride means nothing."""
    return x.shape[-1] == 1 or x.stride(-1) == 1


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where kernels are interpreted."""
    return _counted.get() or _processors(device)


@contextmanager
def counting(count: int) -> Iterator[None]:
    """Plan for a device of so many processors inside the block, whatever is here."""
    token = _counted.set(count)
    try:
        yield
    finally:
        _counted.reset(token)


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
