"""A training batch's prompt pool: every row's own copy of its prompt, thinned, made and differentiated in one pass.

Owns how prompts that learn become pages. Knows neither whose rows these are nor how it is drawn what they leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from promptmux_kernels.rows import PromptBatch, Rows, to_pages


@dataclass(frozen=True)
class Thinning:
    """What rows leave out of their prompt, and what the rest is multiplied by to make up for it."""

    kept: Sequence[Tensor]
    """Of each row 1 or 0, uint8: (2, L, pages, H, PAGE, D), for K and V."""
    scale: float


@dataclass(frozen=True)
class RowsPrompt:
    """One prompt in front of `rows` rows that follow one another, in `layers` (None: in all)."""

    key: Tensor
    """(L, pages, H, PAGE, D), as `to_pages` makes it."""
    value: Tensor
    length: int
    rows: int
    layers: range | None = None
    thinning: Thinning | None = None
    """None: all rows read the same pages."""

    @classmethod
    def of(cls, key: Tensor, value: Tensor, rows: int, layers: range | None = None) -> RowsPrompt:
        """Of K and V, each (L, H, P, D)."""
        return cls(to_pages(key), to_pages(value), key.shape[2], rows, layers)

    @property
    def copies(self) -> int:
        return self.rows if self.thinning else 1


def pack_rows(prompts: Sequence[RowsPrompt], dtype: torch.dtype) -> PromptBatch:
    """The pool of a batch whose rows follow the order of `prompts`.

    It is of `dtype` if no two rows share a page: a gradient is then rounded once, as the row's own would be. Otherwise
    it stays in the prompts' float32, in which the gradients of many rows are summed.
    """
    if not all(prompt.rows == prompt.copies for prompt in prompts):
        dtype = prompts[0].key.dtype
    counts = [prompt.key.shape[1] for prompt in prompts]
    spans = Rows.packed([prompt.copies * count for prompt, count in zip(prompts, counts, strict=True)])
    key, value = (
        _Pool.apply(prompts, spans, dtype, side, *pages)  # type: ignore[no-untyped-call]
        for side, pages in enumerate(([p.key for p in prompts], [p.value for p in prompts]))
    )
    table = torch.zeros(sum(prompt.rows for prompt in prompts), max(1, *counts), dtype=torch.int64)
    lengths: list[int] = []
    layers: list[range | None] = []
    for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        own = torch.arange(spans.slice(number).start, spans.slice(number).stop).view(prompt.copies, count)
        table[len(lengths) : len(lengths) + prompt.rows, :count] = own
        lengths += [prompt.length] * prompt.rows
        layers += [prompt.layers] * prompt.rows
    return PromptBatch(key, value, table.to(key.device), tuple(lengths), tuple(layers))


class _Pool(torch.autograd.Function):
    """K or V of all rows' copies, (L, pages, H, PAGE, D).

    In steps of PyTorch, each of which wrote every copy once more in float32, a step of `pocket` took 118 ms, not 104.
    """

    @staticmethod
    def forward(
        ctx: Any, prompts: Sequence[RowsPrompt], spans: Rows, dtype: torch.dtype, side: int, *pages: Tensor
    ) -> Tensor:
        ctx.prompts, ctx.spans, ctx.side, ctx.type = prompts, spans, side, pages[0].dtype
        layers, _, *page = pages[0].shape
        pool = pages[0].new_empty((layers, spans.total, *page), dtype=dtype)
        for prompt, own, copies in zip(prompts, pages, _copies(pool, prompts, spans), strict=True):
            if prompt.thinning is None:
                copies[0].copy_(own)
                continue
            scaled = (own * prompt.thinning.scale).to(dtype)
            for copy, kept in zip(copies, prompt.thinning.kept, strict=True):
                torch.mul(scaled, kept[side], out=copy)
        return pool

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = []
        for prompt, copies in zip(ctx.prompts, _copies(gradients[0], ctx.prompts, ctx.spans), strict=True):
            if prompt.thinning is None:
                found.append(copies[0].to(ctx.type))
                continue
            total = torch.zeros_like(copies[0], dtype=ctx.type)
            for copy, kept in zip(copies, prompt.thinning.kept, strict=True):
                total += copy * kept[ctx.side]
            found.append(total.mul_(prompt.thinning.scale))
        return None, None, None, None, *found


def _copies(pool: Tensor, prompts: Sequence[RowsPrompt], spans: Rows) -> list[tuple[Tensor, ...]]:
    """Each prompt's copies in a pool (L, pages, H, PAGE, D), (L, n, H, PAGE, D) each."""
    return [
        pool[:, spans.slice(number)].unflatten(1, (prompt.copies, prompt.key.shape[1])).unbind(1)
        for number, prompt in enumerate(prompts)
    ]
