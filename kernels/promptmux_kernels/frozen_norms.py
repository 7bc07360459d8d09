"""`gelu_norm` with frozen weights and a gradient for its input, on a CPU: one compiled pass back from the input alone.

Owns what is kept for the way back, not what GELU makes of the input. `batched` answers where weights learn, and where
the library cannot. Contracts: `dispatch`; the arithmetic: `native/norm_gradients.h`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from promptmux_kernels import batched, cpu
from promptmux_kernels.rows import Affine


def gelu_norm(x: Tensor, affine: Affine, eps: float) -> Tensor:
    learns = any(weight.requires_grad for weight in affine)
    if learns or not x.is_cpu or not cpu.can_norm(x, *affine):
        return batched.gelu_norm(x, affine, eps)
    out: Tensor = _GeluNorm.apply(x, affine, eps)  # type: ignore[no-untyped-call]
    return out


class _GeluNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, affine: Affine, eps: float) -> Tensor:
        ctx.weight, ctx.eps = affine[0], eps
        ctx.save_for_backward(x)
        return cpu.gelu_norm(x, affine, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return cpu.gelu_norm_gradient(x, ctx.weight, ctx.eps, gradients[0]), None, None
