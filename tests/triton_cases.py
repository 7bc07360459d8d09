"""What the tests of Triton kernels share: the float64 oracle, tolerances with their reasons, random batches.

Kernels are interpreted on CPU tensors; with TRITON_INTERPRET=0 and a GPU the same tests run compiled.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from promptmux_kernels import BiasFactors, CrossMemory, PagedPrompts, Rows, SharedBias, use_form
from promptmux_kernels.rows import PAGE

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")

DTYPES = [torch.float32, torch.float16]
"""Not bfloat16: the interpreter multiplies it wrongly without a word."""

TOLERANCES = {torch.float32: 4e-6, torch.float16: 2.5e-3}
"""Largest error against float64 from the same rounded inputs, for averages of values of size one.

float32: a score is a sum of 80 products of size one and its bias, so off by about 1e-6, and with it each weight.
float16: the weights are rounded to 2**-11 before they multiply the values, and the result (below 4) once more.
"""

POISONS = [float("nan"), float("inf"), float("-inf"), 3e38]


class Random:
    """Seeded normal tensors, one stream per test."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype or self.dtype).to(DEVICE)

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator).to(DEVICE)

    def prompts(self, lengths: Sequence[int], heads: int, dim: int, spare: int = 3) -> PagedPrompts:
        """Pages scattered over a pool that holds `spare` pages of nobody's."""
        counts = [-(-length // PAGE) for length in lengths]
        order = self.order(sum(counts) + spare)
        table = torch.zeros(len(lengths), max(1, *counts), dtype=torch.int64, device=DEVICE)
        used = 0
        for row, count in enumerate(counts):
            table[row, :count] = order[used : used + count]
            used += count
        key, value = (self.normal(len(order), heads, PAGE, dim) for _ in range(2))
        return PagedPrompts(key, value, table, tuple(lengths))

    def factors(self, tokens: int, heads: int, dim: int) -> BiasFactors:
        """Tokens of which the last third is text: pairs across have no relative part."""
        texts = tokens // 3
        images = tokens - texts
        far = 1 << 20
        image, text = torch.arange(images), torch.arange(texts)
        size = 2 * images + 2 * texts
        query_code = torch.cat([image + images - 1, text + 2 * images + texts - far]).int()
        key_code = torch.cat([-image, far - text]).int()
        return BiasFactors(
            query=self.normal(heads, tokens, dim) * 0.1,
            key=self.normal(heads, tokens, dim),
            query_code=query_code.to(DEVICE),
            key_code=key_code.to(DEVICE),
            relative=self.normal(heads, size),
        )


def widened(value: Any) -> Any:
    """The same call in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: widened(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(widened(part) for part in value)
    if isinstance(value, (PagedPrompts, SharedBias, BiasFactors, CrossMemory)):
        parts = {field.name: widened(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def in_triton(op: Callable[..., Any], *inputs: Tensor, **case: Any) -> Any:
    with use_form("triton"):
        return op(*inputs, **case)


def in_float64(op: Callable[..., Any], *inputs: Tensor, **case: Any) -> Any:
    with use_form("reference"):
        return op(*widened(inputs), **widened(case))


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, check_dtype=False)


def ragged(count: int, row: int, seed: int) -> Rows:
    """`count` rows of 1 to 9 tokens, of which number `row` has 7."""
    drawn = torch.randint(1, 10, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn[row] = 7
    return Rows.packed(drawn)
