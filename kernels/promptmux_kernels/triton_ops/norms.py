"""The two places where OFA's many LayerNorms pay to be fused: bytes moved decide, with a few FLOPs per element.

    norm_add_norm   total = x + LN_inner(y), (total, LN_outer(total)): 4 passes over (T, d_model) instead of 7
    gelu_norm       LN(gelu(x)) over the feed-forward width: 2 passes over (T, ffn_dim) instead of 4

One program holds one token's whole row in registers, so mean and variance are exact two-pass sums in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from promptmux_kernels.rows import Affine
from promptmux_kernels.triton_ops import launch
from promptmux_kernels.triton_ops.configs import Config

LANES_PER_WARP = 256
"""Eight elements per thread: 16 bytes of a 16-bit type, one vector load."""


@triton.jit
def _normalise(x, real, weight, bias, lane, width, eps):
    """LayerNorm of one row x (LANES,) in float32, zero outside of the `real` lanes."""
    mean = tl.sum(x, 0) / width
    centred = tl.where(real, x - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    w = tl.load(weight + lane, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + lane, mask=real, other=0.0).to(tl.float32)
    return centred / deviation * w + b


@triton.jit
def norm_add_norm_kernel(
    x_ptr, y_ptr, total_ptr, out_ptr,  # (T, width), contiguous
    inner_weight, inner_bias, outer_weight, outer_bias,  # (width,)
    width, eps, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    lane = tl.arange(0, LANES)
    real = lane < width
    x = tl.load(x_ptr + row + lane, mask=real, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row + lane, mask=real, other=0.0).to(tl.float32)
    total = (x + _normalise(y, real, inner_weight, inner_bias, lane, width, eps)).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row + lane, total, mask=real)
    normed = _normalise(total.to(tl.float32), real, outer_weight, outer_bias, lane, width, eps)
    tl.store(out_ptr + row + lane, normed.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def gelu_norm_kernel(x_ptr, out_ptr, weight, bias, width, eps, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    lane = tl.arange(0, LANES)
    real = lane < width
    x = tl.load(x_ptr + row + lane, mask=real, other=0.0).to(tl.float32)
    gelu = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    normed = _normalise(gelu, real, weight, bias, lane, width, eps)
    tl.store(out_ptr + row + lane, normed.to(out_ptr.dtype.element_ty), mask=real)


def norm_add_norm(x: Tensor, y: Tensor, inner: Affine, outer: Affine, eps: float) -> tuple[Tensor, Tensor]:
    """`dispatch.norm_add_norm` on a GPU."""
    x, y = x.contiguous(), y.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    config = row_config(x.shape[1])
    launch.run(
        norm_add_norm_kernel,
        (x.shape[0],),
        config,
        x_ptr=x,
        y_ptr=y,
        total_ptr=total,
        out_ptr=out,
        inner_weight=inner[0],
        inner_bias=inner[1],
        outer_weight=outer[0],
        outer_bias=outer[1],
        width=x.shape[1],
        eps=eps,
        LANES=config.keys,
    )
    return total, out


def gelu_norm(x: Tensor, affine: Affine, eps: float) -> Tensor:
    """`dispatch.gelu_norm` on a GPU."""
    x = x.contiguous()
    out = torch.empty_like(x)
    config = row_config(x.shape[1])
    launch.run(
        gelu_norm_kernel,
        (x.shape[0],),
        config,
        x_ptr=x,
        out_ptr=out,
        weight=affine[0],
        bias=affine[1],
        width=x.shape[1],
        eps=eps,
        LANES=config.keys,
    )
    return out


def row_config(width: int) -> Config:
    """One row per program, as many warps as it has vectors for."""
    padded = triton.next_power_of_2(width)
    return Config(rows=1, keys=padded, warps=min(16, max(1, padded // LANES_PER_WARP)), stages=1)
