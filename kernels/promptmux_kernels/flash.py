"""The form for training on a CPU: PyTorch's flash attention, which keeps no scores for the backward pass.

Rows of equal length and equal prompt length share a call; nothing is padded, so a row's numbers do not depend on the
batch. Knows by name an operator inside torch that also returns the log-sum; `batched` answers what it cannot do
(position biases that learn, rows that do not lie packed, decoding steps) or does slower. Contracts: `dispatch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from promptmux_kernels import batched
from promptmux_kernels.batched import norm_add_norm, pack_bias, pack_memory, prefix_decode_attention, write_cache
from promptmux_kernels.frozen_norms import gelu_norm
from promptmux_kernels.rows import PAGE, PLAIN, BiasFactors, CrossMemory, PagedPrompts, Rows, SharedBias

__all__ = [
    "cross_decode_attention",
    "gelu_norm",
    "norm_add_norm",
    "pack_bias",
    "pack_memory",
    "prefix_attention",
    "prefix_decode_attention",
    "write_cache",
]

LONG_ROW = 256
"""In 16 bits `batched` is faster (OFA-base at 384 px 1.1 times, `pocket` 1.4 times), but keeps scores of 28 MB per row
and layer of OFA-base, so rows of this length and more are computed here all the same. In float32 this form is 1.1 times
as fast at either size."""

Kind = TypeVar("Kind")

_Pieces = list[list[Tensor]]
"""Of each row, what stands in front of it: nothing, or a prompt (P, H, D)."""


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rows: Rows,
    prompts: PagedPrompts | None,
    bias: SharedBias,
    scale: float,
    head_scale: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    if not _answers(q, bias, rows):
        return batched.prefix_attention(
            q, k, v, rows=rows, prompts=prompts, bias=bias, scale=scale, head_scale=head_scale, causal=causal
        )
    lengths = (0,) * len(rows) if prompts is None else prompts.lengths
    longest, longest_prompt = max(rows.lengths), max(lengths)
    tables = [_mask(table, longest, longest_prompt, causal) for table in map(_dense, bias.tables)]
    queries, own_keys, own_values = (x.split(rows.lengths) for x in (q, k, v))
    prompt_keys, prompt_values = _prompts_of_rows(prompts, len(rows), q.dtype)
    results = _Results(len(rows))
    for (table, n, length), alike in _by_kind(zip(bias.table_of_row, rows.lengths, lengths, strict=True)).items():
        key = _together([piece for row in alike for piece in (*prompt_keys[row], own_keys[row])], len(alike))
        value = _together([piece for row in alike for piece in (*prompt_values[row], own_values[row])], len(alike))
        query = _together([queries[row] for row in alike], len(alike))
        mask = tables[table][:, :n, longest_prompt - length : longest_prompt + n]
        results.put(alike, *_flash(query, key, value, mask, scale))
    return torch.cat(results.outputs) * head_scale.to(q.dtype)[:, None], torch.cat(results.sums)


def cross_decode_attention(
    q: Tensor,
    *,
    groups: Rows,
    memory: CrossMemory,
    bias: SharedBias,
    first_positions: tuple[int, ...],
    consecutive: bool,
    scale: float,
    head_scale: Tensor,
) -> Tensor:
    assert memory.layout == PLAIN
    if not consecutive or not _answers(q, bias, groups, memory.rows):
        return batched.cross_decode_attention(
            q,
            groups=groups,
            memory=memory,
            bias=bias,
            first_positions=first_positions,
            consecutive=consecutive,
            scale=scale,
            head_scale=head_scale,
        )
    tables = [_dense(table) for table in bias.tables]
    queries = q.split(groups.lengths)
    keys, values = (x.split(memory.rows.lengths) for x in (memory.key, memory.value))
    results = _Results(len(groups))
    kinds = zip(bias.table_of_row, first_positions, groups.lengths, memory.rows.lengths, strict=True)
    for (table, first, n, length), alike in _by_kind(kinds).items():
        query, key, value = (_together([x[row] for row in alike], len(alike)) for x in (queries, keys, values))
        results.put(alike, *_flash(query, key, value, tables[table][:, first : first + n, :length], scale))
    return torch.cat(results.outputs) * head_scale.to(q.dtype)[:, None]


def _answers(q: Tensor, bias: SharedBias, *layouts: Rows) -> bool:
    """Whether the operator can do it, and should."""
    learns = any(table.requires_grad for table in bias.tables if isinstance(table, Tensor))
    packed = all(rows == Rows.packed(rows.lengths) for rows in layouts)
    pays = q.dtype == torch.float32 or max(layouts[-1].lengths) >= LONG_ROW
    return q.device.type == "cpu" and not learns and packed and pays


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of (b, n, H, D) to (b, m, H, D) under a mask (H, n, m): values (b, n, H, D), log-sums (b, n, H)."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask[None], scale=scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _mask(table: Tensor, longest: int, longest_prompt: int, causal: bool) -> Tensor:
    """What is added to scores (H, n, P + n): nothing in front, where prompts stand, then the bias."""
    own = table[:, :longest, :longest]
    if causal:
        own = own.masked_fill(torch.ones(longest, longest, dtype=torch.bool).triu(1), -torch.inf)
    return F.pad(own, (longest_prompt, 0))


def _dense(table: Tensor | BiasFactors) -> Tensor:
    """A table in float32, which the operator takes beside any type."""
    return (table.dense() if isinstance(table, BiasFactors) else table).float()


def _prompts_of_rows(prompts: PagedPrompts | None, rows: int, dtype: torch.dtype) -> tuple[_Pieces, _Pieces]:
    """K and V of each row's prompt, (P, H, D) if there is one; each prompt is taken from the pool once."""
    if prompts is None or not any(prompts.lengths):
        return [[]] * rows, [[]] * rows
    pages = [tuple(row[: -(-n // PAGE)]) for row, n in zip(prompts.table.tolist(), prompts.lengths, strict=True)]
    kinds = _by_kind(pages)
    order = torch.tensor([page for kind in kinds for page in kind])
    sides = []
    for pool in (prompts.key, prompts.value):
        parts = pool.index_select(0, order).to(dtype).transpose(1, 2).split([len(kind) for kind in kinds])
        whole = {kind: part.flatten(0, 1) for kind, part in zip(kinds, parts, strict=True)}  # (P up to a page, H, D)
        sides.append([[whole[kind][:n]] if n else [] for kind, n in zip(pages, prompts.lengths, strict=True)])
    return sides[0], sides[1]


def _together(pieces: Sequence[Tensor], rows: int) -> Tensor:
    """Pieces of rows (.., H, D), all rows of one length, one behind the other: (rows, length, H, D)."""
    flat = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
    return flat.view(rows, -1, *flat.shape[1:])


def _by_kind(kinds: Iterable[Kind]) -> dict[Kind, list[int]]:
    """Which rows are of each kind."""
    found: dict[Kind, list[int]] = {}
    for row, kind in enumerate(kinds):
        found.setdefault(kind, []).append(row)
    return found


class _Results:
    """What rows got, each under its number."""

    def __init__(self, rows: int) -> None:
        self.outputs: list[Tensor] = [torch.empty(0)] * rows
        self.sums: list[Tensor] = [torch.empty(0)] * rows

    def put(self, rows: Sequence[int], outputs: Tensor, sums: Tensor) -> None:
        for row, output, total in zip(rows, outputs.unbind(0), sums.unbind(0), strict=True):
            self.outputs[row], self.sums[row] = output, total
