"""The nouns that every op shares: ragged rows, a paged prompt pool, position biases shared by many rows.

Owns how a batch is laid out in memory. Knows nothing of how attention is computed, nor whose prompt is whose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PAGE = 32
"""Prompt positions per page: one key tile of a kernel, so that a tile needs one scalar page number."""


Affine = tuple[Tensor, Tensor]
"""Weight and bias of a LayerNorm, each as wide as what it normalises."""


@dataclass(frozen=True)
class Rows:
    """How a flat token axis divides into rows; rows need not touch, so a subset of a batch costs no copy."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def packed(cls, lengths: Sequence[int]) -> Rows:
        """Rows that follow one another without gaps."""
        starts, end = [], 0
        for length in lengths:
            starts.append(end)
            end += length
        return cls(tuple(starts), tuple(lengths))

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def total(self) -> int:
        """Tokens in all rows together."""
        return sum(self.lengths)

    def slice(self, row: int) -> slice:
        return slice(self.starts[row], self.starts[row] + self.lengths[row])

    def select(self, rows: Sequence[int]) -> Rows:
        """The given rows, in the given order, over the same flat axis."""
        return Rows(tuple(self.starts[r] for r in rows), tuple(self.lengths[r] for r in rows))


@dataclass(frozen=True)
class BiasFactors:
    """What a dense bias table is made of: projected positions and one relative table, a hundredth of its bytes.

        bias[h, i, j] = query[h, i] . key[h, j] + relative[h, c]    with c = query_code[i] + key_code[j]

    and no relative part where c lies outside the table (between image and text). `query` and `key` are (H, n, D) with
    the scale in `query`, the codes (n,) int32, `relative` (H, size).
    """

    query: Tensor
    key: Tensor
    query_code: Tensor
    key_code: Tensor
    relative: Tensor

    def dense(self) -> Tensor:
        """The table (H, n, n) in float32, in float64 where the factors are."""
        query, key, table = (
            x if x.dtype == torch.float64 else x.float() for x in (self.query, self.key, self.relative)
        )
        code = self.query_code[:, None] + self.key_code[None, :]
        known = (code >= 0) & (code < self.relative.shape[1])
        return query @ key.transpose(1, 2) + table[:, code.where(known, 0).long()] * known


@dataclass(frozen=True)
class SharedBias:
    """Additive position biases, one table for all rows of a kind (an image grid), never one per row.

    `tables[table_of_row[r]]` is (H, Q, K), float32 or float16; row r uses its top-left (H, n_q, n_k) block. Encoder
    tables may stay in factors where many grids would not fit.
    """

    tables: tuple[Tensor | BiasFactors, ...]
    table_of_row: tuple[int, ...]

    def of(self, row: int) -> Tensor:
        """The row's dense table (H, Q, K)."""
        table = self.tables[self.table_of_row[row]]
        return table.dense() if isinstance(table, BiasFactors) else table

    @property
    def values(self) -> tuple[Tensor, ...]:
        """What a gradient could flow to."""
        parts = ((t.query, t.key, t.relative) if isinstance(t, BiasFactors) else (t,) for t in self.tables)
        return tuple(part for table in parts for part in table)

    def select(self, rows: Sequence[int]) -> SharedBias:
        return SharedBias(self.tables, tuple(self.table_of_row[r] for r in rows))


PLAIN = "plain"
"""The layout of a memory that every form but the CPU's compiled one reads."""

FILL = 16
"""In any other layout a row takes a multiple of so many places, as a CPU's vectors are wide."""


@dataclass(frozen=True)
class CrossMemory:
    """One layer's cross-attention keys and values of a batch, made once by `pack_memory` and read at every step.

    `key` and `value` are (T, H, D) over the flat axis of `rows` in the plain layout; `layout` names any other, which
    only the form that packed it can read.
    """

    key: Tensor
    value: Tensor
    rows: Rows
    layout: str = PLAIN

    def select(self, rows: Sequence[int]) -> CrossMemory:
        """The memory of some requests of the batch, without a copy."""
        return CrossMemory(self.key, self.value, self.rows.select(rows), self.layout)

    def span(self, row: int) -> slice:
        """The places that a row takes on the flat axis; moved as one piece, they mean the same elsewhere."""
        start, length = self.rows.starts[row], self.rows.lengths[row]
        return slice(start, start + (length if self.layout == PLAIN else -(-length // FILL) * FILL))


@dataclass(frozen=True)
class PagedPrompts:
    """One layer's prompt pool and the pages that each row reads.

    `key` and `value` are (pages, H, PAGE, D); `table` is (B, max_pages) int64; only the first
    `lengths[b]` positions of row b's pages count, whatever the rest of the pool holds.
    """

    key: Tensor
    value: Tensor
    table: Tensor
    lengths: tuple[int, ...]

    def gather(self, row: int) -> tuple[Tensor, Tensor]:
        """Row's own prompt K and V, each (H, P, D)."""
        length = self.lengths[row]
        pages = self.table[row, : -(-length // PAGE)]
        return _join_pages(self.key[pages])[:, :length], _join_pages(self.value[pages])[:, :length]

    def gather_padded(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """K and V of several rows, each (b, H, P_max, D), zero behind a row's own length, and the mask (b, P_max).

        Zeroed rather than masked later: 0 times a stranger's NaN would still be NaN.
        """
        longest = max(self.lengths[r] for r in rows)
        pages = self.table[list(rows), : -(-longest // PAGE)]  # (b, n)
        lengths = torch.tensor([self.lengths[r] for r in rows], device=self.key.device)
        valid = torch.arange(longest, device=self.key.device) < lengths[:, None]  # (b, P_max)
        key, value = (
            torch.where(valid[:, None, :, None], _join_pages(pool[pages])[:, :, :longest], 0)
            for pool in (self.key, self.value)
        )
        return key, value, valid


def _join_pages(pages: Tensor) -> Tensor:
    """(..., n, H, PAGE, D) -> (..., H, n * PAGE, D)."""
    return pages.transpose(-4, -3).flatten(-3, -2)


@dataclass(frozen=True)
class PromptBatch:
    """The prompt pool of one side (encoder or decoder) with the pages of each row of a batch.

    `key` and `value` are (L, pages, H, PAGE, D). A row has no prompt in layers outside `layers[b]`, None standing for
    all; zeros there would be no substitute, for a key of zeros draws attention away from the row's own.
    """

    key: Tensor
    value: Tensor
    table: Tensor
    lengths: tuple[int, ...]
    layers: tuple[range | None, ...] | None = None
    """None: every row's prompt is in all layers."""

    def layer(self, index: int) -> PagedPrompts:
        return PagedPrompts(self._keys[index], self._values[index], self.table, self._lengths(index))

    def _lengths(self, index: int) -> tuple[int, ...]:
        if self.layers is None:
            return self.lengths
        pairs = zip(self.lengths, self.layers, strict=True)
        return tuple(length if own is None or index in own else 0 for length, own in pairs)

    # Unbound once: the gradient of a layer that is taken by its index is as large as all layers.
    @cached_property
    def _keys(self) -> tuple[Tensor, ...]:
        return self.key.unbind(0)

    @cached_property
    def _values(self) -> tuple[Tensor, ...]:
        return self.value.unbind(0)

    def select(self, rows: Sequence[int]) -> PromptBatch:
        layers = None if self.layers is None else tuple(self.layers[r] for r in rows)
        return PromptBatch(self.key, self.value, self.table[list(rows)], tuple(self.lengths[r] for r in rows), layers)


def to_pages(prompt: Tensor) -> Tensor:
    """(L, H, P, D) -> (L, ceil(P / PAGE), H, PAGE, D), the last page filled up with zeros."""
    layers, heads, length, dim = prompt.shape
    pages = -(-length // PAGE)
    padded = torch.nn.functional.pad(prompt, (0, 0, 0, pages * PAGE - length))
    return padded.view(layers, heads, pages, PAGE, dim).transpose(1, 2)


def pack_prompts(
    prompts: Sequence[tuple[Tensor, Tensor]], row_prompt: Sequence[int], layers: Sequence[range | None] = ()
) -> PromptBatch:
    """Lay prompts (K, V), each (L, H, P, D), out as a pool; row b of the batch reads prompt `row_prompt[b]`.

    Prompt p is in `layers[p]` only, if that is given. Differentiable in the prompts, so that a trainer and a server
    read the same pool in the same way.
    """
    counts = [-(-key.shape[2] // PAGE) for key, _ in prompts]
    spans = Rows.packed(counts)
    width = max(1, *counts) if counts else 1
    table = torch.zeros(len(row_prompt), width, dtype=torch.int64, device=prompts[0][0].device)
    for row, prompt in enumerate(row_prompt):
        span = spans.slice(prompt)
        table[row, : counts[prompt]] = torch.arange(span.start, span.stop, device=table.device)
    return PromptBatch(
        key=torch.cat([to_pages(key) for key, _ in prompts], dim=1),
        value=torch.cat([to_pages(value) for _, value in prompts], dim=1),
        table=table,
        lengths=tuple(prompts[p][0].shape[2] for p in row_prompt),
        layers=tuple(layers[p] for p in row_prompt) if any(layers) else None,
    )
