"""Moving K and V in and out of pools by slot. Attention reads slots in place, so only new tokens are ever copied.

write_cache    cache_key[slots] = key, cache_value[slots] = value: both in one launch
gather_slots   pool[slots] where valid, zero elsewhere, whatever the pool holds there
pack_memory    the plain layout is the one the kernels read: nothing to do
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from promptmux_kernels.reference import pack_memory
from promptmux_kernels.triton_ops import launch
from promptmux_kernels.triton_ops.norms import row_config

__all__ = ["gather_slots", "pack_memory", "write_cache"]


@triton.jit
def write_cache_kernel(
    cache_key, cache_value, stride_slot, slots, key, value, stride_token, width, LANES: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0)
    lane = tl.arange(0, LANES)
    real = lane < width
    to = tl.load(slots + token) * stride_slot + lane
    at = token * stride_token + lane
    tl.store(cache_key + to, tl.load(key + at, mask=real).to(cache_key.dtype.element_ty), mask=real)
    tl.store(cache_value + to, tl.load(value + at, mask=real).to(cache_value.dtype.element_ty), mask=real)


@triton.jit
def gather_slots_kernel(pool, stride_slot, slots, valid, out, width, LANES: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    read = tl.load(valid + row).to(tl.int32) * width  # 0 lanes of a slot that is not valid: its contents stay unread
    taken = tl.load(pool + tl.load(slots + row) * stride_slot + lane, mask=lane < read, other=0.0)
    tl.store(out + row.to(tl.int64) * width + lane, taken, mask=lane < width)


def write_cache(cache_key: Tensor, cache_value: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """`dispatch.write_cache` on a GPU."""
    assert cache_key.stride() == cache_value.stride(), "K and V of a cache are laid out alike"
    assert cache_key[0].is_contiguous()
    key, value = (launch.by_heads(x) for x in (key, value))
    if key.stride(0) != value.stride(0):
        key, value = key.contiguous(), value.contiguous()
    width = key[0].numel()
    config = row_config(width)
    launch.run(
        write_cache_kernel,
        (len(slots),),
        config,
        cache_key=cache_key,
        cache_value=cache_value,
        stride_slot=cache_key.stride(0),
        slots=slots,
        key=key,
        value=value,
        stride_token=key.stride(0),
        width=width,
        LANES=config.keys,
    )


def gather_slots(pool: Tensor, slots: Tensor, valid: Tensor) -> Tensor:
    """pool (slots, ...) at `slots` (n,) int64 where `valid` (n,) bool, zero elsewhere -> (n, ...)."""
    assert pool[0].is_contiguous()
    out = torch.empty(len(slots), *pool.shape[1:], dtype=pool.dtype, device=pool.device)
    width = pool[0].numel()
    config = row_config(width)
    launch.run(
        gather_slots_kernel,
        (len(slots),),
        config,
        pool=pool,
        stride_slot=pool.stride(0),
        slots=slots,
        valid=valid,
        out=out,
        width=width,
        LANES=config.keys,
    )
    return out
