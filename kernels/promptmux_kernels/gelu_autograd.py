"""`gelu_norm` of the compiled CPU form with the gradient of its input, for weights that are frozen.

Owns what is kept for the way back: the input alone, not what GELU makes of it. The arithmetic of both ways:
`native/norms.h`, `native/norm_gradients.h`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from promptmux_kernels.rows import Affine


class GeluNorm(torch.autograd.Function):
    """x, its norm's weight and bias, eps -> LN(gelu(x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, affine: Affine, eps: float) -> Tensor:
        ctx.weight, ctx.eps = affine[0], eps
        ctx.save_for_backward(x)
        out: Tensor = torch.ops.promptmux_cpu.gelu_norm(x, *affine, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.promptmux_cpu.gelu_norm_gradient(x, ctx.weight, ctx.eps, grad.contiguous()), None, None
