"""The oracle: every op once, row by row, in float32, written to be read rather than to be fast.

The other forms are tested against this one; float64 inputs stay float64, to measure what narrower types lose. It is
differentiable, so it is also the oracle of gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from promptmux_kernels.rows import PLAIN, Affine, CrossMemory, PagedPrompts, Rows, SharedBias


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
    out = torch.zeros_like(q)
    lse = _wide(torch.zeros_like(q[..., 0]))
    for row in range(len(rows)):
        own = rows.slice(row)
        n = rows.lengths[row]
        scores = _scores(q[own], k[own], scale) + bias.of(row)[:, :n, :n]  # (H, n, n)
        if causal:
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        value = _heads_first(v[own])  # (H, n, D)
        if prompts is not None and prompts.lengths[row]:
            prompt_key, prompt_value = prompts.gather(row)
            scores = torch.cat([_scores(q[own], prompt_key.transpose(0, 1), scale), scores], dim=-1)
            value = torch.cat([_wide(prompt_value), value], dim=1)
        out[own] = _combine(scores, value, head_scale).to(q.dtype)
        lse[own] = scores.logsumexp(-1).T
    return out, lse


def prefix_decode_attention(
    q: Tensor,
    *,
    groups: Rows,
    prompts: PagedPrompts | None,
    cache_key: Tensor,
    cache_value: Tensor,
    history: Tensor,
    history_lengths: tuple[int, ...],
    bias: Tensor,
    scale: float,
    head_scale: Tensor,
) -> Tensor:
    out = torch.zeros_like(q)
    for group, t in enumerate(history_lengths):
        for beam in range(groups.starts[group], groups.starts[group] + groups.lengths[group]):
            slots = history[beam, :t]
            query = q[beam : beam + 1]
            scores = _scores(query, cache_key[slots], scale) + bias[:, t - 1 : t, :t]  # (H, 1, t)
            value = _heads_first(cache_value[slots])
            if prompts is not None and prompts.lengths[group]:
                prompt_key, prompt_value = prompts.gather(group)
                scores = torch.cat([_scores(query, prompt_key.transpose(0, 1), scale), scores], dim=-1)
                value = torch.cat([_wide(prompt_value), value], dim=1)
            out[beam : beam + 1] = _combine(scores, value, head_scale).to(q.dtype)
    return out


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
    out = torch.zeros_like(q)
    for group, first in enumerate(first_positions):
        own, seen = groups.slice(group), memory.rows.slice(group)
        n = groups.lengths[group]
        positions = slice(first, first + n) if consecutive else slice(first, first + 1)
        table = bias.of(group)[:, positions, : memory.rows.lengths[group]]  # (H, n or 1, keys)
        scores = _scores(q[own], memory.key[seen], scale) + table
        out[own] = _combine(scores, _heads_first(memory.value[seen]), head_scale).to(q.dtype)
    return out


def pack_memory(key: Tensor, value: Tensor, rows: Rows) -> CrossMemory:
    return CrossMemory(key, value, rows)


def pack_bias(table: Tensor, dtype: torch.dtype) -> Tensor:
    return table


def write_cache(cache_key: Tensor, cache_value: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    cache_key[slots] = key.to(cache_key.dtype)
    cache_value[slots] = value.to(cache_value.dtype)


def gather_slots(pool: Tensor, slots: Tensor, valid: Tensor) -> Tensor:
    taken = pool[slots.where(valid, 0)]
    return torch.where(valid.view(*valid.shape, *(1,) * (taken.ndim - valid.ndim)), taken, 0)


def norm_add_norm(x: Tensor, y: Tensor, inner: Affine, outer: Affine, eps: float) -> tuple[Tensor, Tensor]:
    total = x + F.layer_norm(y, y.shape[-1:], *inner, eps)
    return total, F.layer_norm(total, total.shape[-1:], *outer, eps)


def gelu_norm(x: Tensor, affine: Affine, eps: float) -> Tensor:
    return F.layer_norm(F.gelu(x), x.shape[-1:], *affine, eps)


def _heads_first(x: Tensor) -> Tensor:
    """(n, H, D) -> (H, n, D)."""
    return _wide(x.transpose(0, 1))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled q.k of (n, H, D) and (m, H, D) -> (H, n, m)."""
    return (_heads_first(q) * scale) @ _heads_first(k).transpose(1, 2)


def _combine(scores: Tensor, value: Tensor, head_scale: Tensor) -> Tensor:
    """softmax(scores) . value, times each head's scale -> (n, H, D)."""
    out = scores.softmax(dim=-1) @ value  # (H, n, D)
    return (out * _wide(head_scale)[:, None, None]).transpose(0, 1)
