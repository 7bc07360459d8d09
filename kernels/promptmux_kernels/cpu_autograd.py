"""Attention of the compiled CPU form with its gradients: how a batch reaches the C++ operators, and what is kept.

For the way back that is inputs, outputs and log-sums, never scores (28 MB per row and layer of OFA-base). Gradients go
to queries, keys, values and prompts; biases and the heads' scales do not learn here. The arithmetic of both ways:
`native/*.h`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from promptmux_kernels.rows import FILL, PAGE, BiasFactors, PagedPrompts, Rows, SharedBias

Pages = tuple[Tensor, Tensor, Tensor, list[int]]
"""Pool of keys and of values, page table and lengths, as the library takes them."""


@dataclass(frozen=True)
class Attention(ABC):
    """An attention but for its queries, keys and values: which of them meet, and how they are weighed."""

    rows: Rows
    keys: Rows
    prompts: PagedPrompts | None
    bias: SharedBias
    first_positions: Sequence[int]
    causal: bool
    scale: float
    head_scale: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (T, H, D) of the type of q and, without a gradient of their own, log-sums (T, H)."""
        pools = (self.prompts.key, self.prompts.value) if self.prompts else (None, None)
        out: tuple[Tensor, Tensor] = _Differentiable.apply(self, q, k, v, *pools)  # type: ignore[no-untyped-call]
        return out

    def can_learn(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether a gradient that is asked for goes only where `backward` sends one, and to rows that lie packed."""
        pools = (self.prompts.key, self.prompts.value) if self.prompts else ()
        fixed = (*self.bias.values, self.head_scale)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v, *pools, *fixed)):
            return True
        packed = all(r == Rows.packed(r.lengths) and r.total == len(x) for r, x in ((self.rows, q), (self.keys, k)))
        return packed and not any(x.requires_grad for x in fixed)

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, pages: Pages) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad: Tensor, saved: Sequence[Tensor], pages: Pages, queries: bool, keys: bool, prompts: bool
    ) -> list[Tensor]:
        """Gradients of q, k, v and of both pools, the pools' in float32; empty tensors where none is asked for."""
        found: list[Tensor] = torch.ops.promptmux_cpu.attention_backward(
            adjacent(grad),
            *saved,
            self.rows.starts,
            self.rows.lengths,
            self.keys.starts,
            self.keys.lengths,
            *pages,
            dense_tables(self.bias),
            self.bias.table_of_row,
            self.first_positions,
            self.scale,
            self.head_scale.float(),
            self.causal,
            queries,
            keys,
            prompts,
        )
        return found


class SelfAttention(Attention):
    """Rows behind their prompts; `keys` are `rows` too, and positions begin at zero."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pages: Pages) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = torch.ops.promptmux_cpu.prefix_attention(
            q,
            k,
            v,
            self.rows.starts,
            self.rows.lengths,
            *pages,
            dense_tables(self.bias),
            self.bias.table_of_row,
            self.scale,
            self.head_scale.float(),
            self.causal,
        )
        return out


class CrossAttention(Attention):
    """Consecutive queries over the keys of a plain memory; there are no prompts, and no key is hidden."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pages: Pages) -> tuple[Tensor, Tensor]:
        places = packed_places(self.keys)
        keys, values = torch.ops.promptmux_cpu.pack_memory(k, v, self.keys.starts, self.keys.lengths, places.starts)
        out: tuple[Tensor, Tensor] = torch.ops.promptmux_cpu.cross_attention(
            q,
            self.rows.starts,
            self.rows.lengths,
            keys,
            values,
            places.starts,
            self.keys.lengths,
            dense_tables(self.bias),
            self.bias.table_of_row,
            self.first_positions,
            True,
            self.scale,
            self.head_scale.float(),
        )
        return out


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, attention: Attention, q: Tensor, k: Tensor, v: Tensor, prompt_key: Tensor, prompt_value: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (adjacent(x) for x in (q, k, v))
        pages = page_arguments(attention.prompts, len(attention.rows), q)
        out, lse = attention.forward(q, k, v, pages)
        ctx.attention, ctx.pages = attention, pages[2:]
        ctx.save_for_backward(q, k, v, out, lse, *pages[:2])
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        attention: Attention = ctx.attention
        *saved, key, value = ctx.saved_tensors
        _, queries, *others = ctx.needs_input_grad
        keys, prompts = any(others[:2]), any(others[2:])
        dq, dk, dv, *pools = attention.backward(grad, saved, (key, value, *ctx.pages), queries, keys, prompts)
        if attention.prompts:
            pools = [pool.to(attention.prompts.key.dtype) for pool in pools]
        return (
            None,
            dq if queries else None,
            *((dk, dv) if keys else (None, None)),
            *(pools if prompts else (None, None)),
        )


def adjacent(x: Tensor) -> Tensor:
    """x (T, H, D) with each token's heads in one piece; tokens may lie apart, as slices of a fused projection do."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def dense_tables(bias: SharedBias) -> list[Tensor]:
    """Dense tables of one element type: float16 if all are, else float32."""
    dense = [table.dense() if isinstance(table, BiasFactors) else table for table in bias.tables]
    half = all(table.dtype == torch.float16 for table in dense)
    return [table if half else table.float() for table in dense]


def packed_places(rows: Rows) -> Rows:
    """Where rows lie in a packed memory, which gives each a multiple of `FILL` places."""
    return Rows.packed([-(-n // FILL) * FILL for n in rows.lengths])


def page_arguments(prompts: PagedPrompts | None, rows: int, like: Tensor) -> Pages:
    """The pool in the type of the queries; without prompts an empty pool and lengths of zero."""
    if prompts is None:
        pool = like.new_empty(0, like.shape[1], PAGE, like.shape[2])
        return pool, pool, torch.zeros(rows, 1, dtype=torch.int64), [0] * rows
    key, value = (pool.to(like.dtype).contiguous() for pool in (prompts.key, prompts.value))
    return key, value, prompts.table.contiguous(), list(prompts.lengths)
