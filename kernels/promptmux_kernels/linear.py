"""Linear layers whose weights are laid out once, at load, as oneDNN reads them; very few rows read them as they were.

The only module that knows oneDNN's operators inside torch by name: they are internal, so their presence and their
result are checked before the first use, and `F.linear` serves where they are missing. For frozen weights on a CPU.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmux_kernels import cpu

Use = Literal["few rows", "many rows"]
"""Rows multiplied at once: the beams of a decoding step, or all tokens of a batch."""

SELF_TEST_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5}
"""Absolute, on sums of 256 products of size one (16 in size): float32 must not be computed in bfloat16 (0.1 off)."""

STREAMED_ROWS = 16
"""Up to so many float32 rows the compiled form, which streams the plain weight, beats oneDNN: 1.5 to 1.8 times at 5
rows, 1.0 to 1.3 times at 16, 0.9 times at 32 (two cores with AVX2)."""


class PackedLinear(nn.Module):
    """x W^T + b with W packed. The plain weight is given up, except where few rows read it: there memory doubles."""

    def __init__(self, weight: Tensor, bias: Tensor | None, use: Use) -> None:
        super().__init__()
        self._bias = bias
        self._streamed = weight.contiguous() if use == "few rows" and cpu.can_stream(weight) else None
        self._packed = pays(weight.dtype, use)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight

    def forward(self, x: Tensor) -> Tensor:
        if (streamed := self._streamed_for(x)) is not None:
            return cpu.few_rows(x, streamed, self._bias)
        if not self._packed:
            return F.linear(x, self._weight, self._bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out

    def _streamed_for(self, x: Tensor) -> Tensor | None:
        """The plain weight, where it is there and x has few enough rows for it."""
        return self._streamed if len(x) <= STREAMED_ROWS else None

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + (x W^T + b), the sum made while the product is written."""
        if (streamed := self._streamed_for(x)) is not None:
            return cpu.few_rows(x, streamed, self._bias, residual)
        if not self._packed:
            return residual + F.linear(x, self._weight, self._bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return out


class WideLinear(nn.Module):
    """x W^T in float32 whatever the operands' type, for a vocabulary: rounded to bfloat16, logits tie and swap places.

    Boxes of `pocket` equal to the float32 model's: 0.744 with rounded logits, 0.932 with these.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._neurons = len(weight)
        self._packed = cpu.pack_weight(weight) if cpu.can_widen(weight) else None
        self._linear = PackedLinear(weight, None, "few rows") if self._packed is None else None

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            return cpu.wide_product(x, self._packed, self._neurons)
        assert self._linear
        out: Tensor = self._linear(x).float()
        return out


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32 with W as it is; only a GPU can keep sums of 16-bit operands unrounded, without gradients."""
    if x.is_cuda and x.dtype != torch.float32 and not torch.is_grad_enabled():
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x, weight).float()


def pays(dtype: torch.dtype, use: Use) -> bool:
    """Whether a packed weight is faster here.

    Few rows: 2 to 4 times. Many rows in bfloat16: 1.1 to 1.3 times. Many rows in float32: 2.3 times on an AVX-512 CPU
    where MKL keeps to AVX2, but 0.85 times where all have AVX2 only.
    """
    if not works(dtype):
        return False
    return use == "few rows" or dtype != torch.float32 or torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def works(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed product is there, for this type natively, and right."""
    if dtype not in SELF_TEST_TOLERANCE or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 256, generator=generator).to(dtype) for n in (5, 64))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        found = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    error = (found.double() - x.double() @ weight.double().T).abs().max()
    return bool(error <= SELF_TEST_TOLERANCE[dtype])
