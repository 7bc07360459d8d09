"""Batched forms of the ops: rows of similar length share a few large matrix products.

Rows are cut into chunks that share one bias table and are padded to their longest member; what is padded is zeroed in
K and V as well as masked, so that nothing of a stranger can reach a row. Contracts: `dispatch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from promptmux_kernels.reference import gather_slots, gelu_norm, norm_add_norm, pack_bias, pack_memory, write_cache
from promptmux_kernels.rows import PLAIN, CrossMemory, PagedPrompts, Rows, SharedBias

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

SCORES_PER_CHUNK = 1 << 22
"""Padded attention scores computed at once: 16 MB in float32, about what stays in a CPU's last-level cache."""


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
    outputs, sums, order = [], [], []
    for chunk in _chunks(rows, rows, bias, heads=q.shape[1]):
        part = rows.select(chunk)
        index, valid = _padded_index(part, q.device)
        query, key, value = (_take(x, index, valid) for x in (q * scale, k, v))  # (b, H, n, D)
        n = query.shape[2]
        scores = (query @ key.transpose(-1, -2)).float() + bias.of(chunk[0])[:, :n, :n]
        if causal:
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
        scores, value = _behind_prompt(query, scores, value, prompts, chunk)
        out = scores.softmax(-1).to(value.dtype) @ value  # (b, H, n, D)
        outputs.append(_untake(out, valid))
        sums.append(_untake(scores.logsumexp(-1), valid))
        order.append(part)
    return _restore(outputs, order, rows) * head_scale.to(q.dtype)[:, None], _restore(sums, order, rows)


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
    outputs, order = [], []
    by_width: dict[int, list[int]] = {}
    for group, width in enumerate(groups.lengths):
        by_width.setdefault(width, []).append(group)
    for width, chunk in by_width.items():
        part = groups.select(chunk)
        index, _ = _padded_index(part, q.device)  # (g, width)
        steps = [history_lengths[group] for group in chunk]
        longest = max(steps)
        slots = history[index.flatten(), :longest]  # (g * width, t)
        reached = torch.tensor(steps, device=q.device).repeat_interleave(width)
        valid = torch.arange(longest, device=q.device) < reached[:, None]  # (g * width, t)
        key, value = (gather_slots(cache, slots, valid) for cache in (cache_key, cache_value))
        query = q[index.flatten()] * scale  # (g * width, H, D)
        scores = torch.einsum("rhd,rthd->rht", query, key).float()
        scores = scores + bias[:, reached - 1, :longest].transpose(0, 1)
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
        outputs.append(_decode_combine(query, scores, value, prompts, chunk, width))
        order.append(part)
    return _restore(outputs, order, groups) * head_scale.to(q.dtype)[:, None]


def _decode_combine(
    query: Tensor, scores: Tensor, value: Tensor, prompts: PagedPrompts | None, chunk: Sequence[int], width: int
) -> Tensor:
    """Softmax over [prompt, history] of each beam; the prompt is read once for all beams of its group."""
    if prompts is None or not any(prompts.lengths[group] for group in chunk):
        return torch.einsum("rht,rthd->rhd", scores.softmax(-1).to(value.dtype), value)
    prompt_key, prompt_value, seen = prompts.gather_padded(chunk)  # (g, H, P, D), (g, P)
    beams = query.view(len(chunk), width, *query.shape[1:]).transpose(1, 2)  # (g, H, width, D)
    prompt_scores = (beams @ prompt_key.to(query.dtype).transpose(-1, -2)).float()
    prompt_scores = prompt_scores.masked_fill(~seen[:, None, None], -torch.inf).transpose(1, 2).flatten(0, 1)
    weights = torch.cat([prompt_scores, scores], dim=-1).softmax(-1).to(value.dtype)  # (g * width, H, P + t)
    length = prompt_key.shape[2]
    from_prompt = weights[..., :length].reshape(len(chunk), width, -1, length).transpose(1, 2) @ prompt_value.to(
        value.dtype
    )
    from_history = torch.einsum("rht,rthd->rhd", weights[..., length:], value)
    return from_history + from_prompt.transpose(1, 2).flatten(0, 1)


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
    outputs, order = [], []
    for chunk in _chunks(groups, memory.rows, bias, heads=q.shape[1]):
        part = groups.select(chunk)
        query_index, query_valid = _padded_index(part, q.device)
        key_index, key_valid = _padded_index(memory.rows.select(chunk), q.device)
        query = _take(q * scale, query_index, query_valid)  # (g, H, n, D)
        scores = (query @ _take(memory.key, key_index, key_valid).transpose(-1, -2)).float()  # (g, H, n, m)
        table = bias.of(chunk[0])[..., : scores.shape[-1]]
        firsts = [first_positions[group] for group in chunk]
        if consecutive and len(set(firsts)) == 1:
            scores = scores + table[:, firsts[0] : firsts[0] + scores.shape[2]]
        elif not consecutive:
            scores = scores + table[:, firsts].transpose(0, 1)[:, :, None]
        else:
            raise AssertionError("prefill rows of one batch start at one position")
        if key_valid is not None:
            scores = scores.masked_fill(~key_valid[:, None, None], -torch.inf)
        out = scores.softmax(-1).to(q.dtype) @ _take(memory.value, key_index, key_valid)
        outputs.append(_untake(out, query_valid))
        order.append(part)
    return _restore(outputs, order, groups) * head_scale.to(q.dtype)[:, None]


def _chunks(queries: Rows, keys: Rows, bias: SharedBias, *, heads: int) -> Iterator[list[int]]:
    """Groups of rows that share a bias table and waste little padding, longest rows first."""
    by_size = sorted(
        range(len(queries)), key=lambda r: (bias.table_of_row[r], -keys.lengths[r], -queries.lengths[r], r)
    )
    chunk: list[int] = []
    widest = 0
    for row in by_size:
        same_table = chunk and bias.table_of_row[row] == bias.table_of_row[chunk[0]]
        padded = max(widest, queries.lengths[row]) * keys.lengths[chunk[0] if chunk else row] * heads
        if chunk and (not same_table or (len(chunk) + 1) * padded > SCORES_PER_CHUNK):
            yield chunk
            chunk, widest = [], 0
        chunk.append(row)
        widest = max(widest, queries.lengths[row])
    if chunk:
        yield chunk


def _padded_index(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Flat positions (b, longest) of the rows' tokens and which of them are real (None if all are)."""
    longest = max(rows.lengths)
    starts = torch.tensor(rows.starts, device=device)[:, None]
    offsets = torch.arange(longest, device=device)
    if min(rows.lengths) == longest:
        return starts + offsets, None
    valid = offsets < torch.tensor(rows.lengths, device=device)[:, None]
    return starts + offsets.where(valid, 0), valid


def _take(x: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """Tokens (T, H, D) of padded rows -> (b, H, n, D), zero where there is no token."""
    # index_select, not x[index]: its backward is index_add, four times faster than an accumulating index_put.
    taken = x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])
    if valid is not None:
        taken = torch.where(valid[..., None, None], taken, 0)
    return taken.transpose(1, 2)


def _untake(out: Tensor, valid: Tensor | None) -> Tensor:
    """(b, H, n, ...) -> the real tokens, (tokens, H, ...)."""
    flat = out.transpose(1, 2)
    return flat.flatten(0, 1) if valid is None else flat[valid]


def _behind_prompt(
    query: Tensor, scores: Tensor, value: Tensor, prompts: PagedPrompts | None, chunk: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Put each row's prompt in front of its own scores and values."""
    if prompts is None or not any(prompts.lengths[row] for row in chunk):
        return scores, value
    prompt_key, prompt_value, seen = prompts.gather_padded(chunk)
    prompt_scores = (query @ prompt_key.to(query.dtype).transpose(-1, -2)).float()
    if not bool(seen.all()):
        prompt_scores = prompt_scores.masked_fill(~seen[:, None, None], -torch.inf)
    return torch.cat([prompt_scores, scores], -1), torch.cat([prompt_value.to(value.dtype), value], 2)


def _restore(outputs: Sequence[Tensor], order: Sequence[Rows], rows: Rows) -> Tensor:
    """Chunk results (in chunk order) -> the flat order of `rows`, which must be packed."""
    if len(outputs) == 1 and order[0] == rows:
        return outputs[0]
    positions = torch.cat(
        [torch.arange(start, start + n) for part in order for start, n in zip(part.starts, part.lengths, strict=True)]
    )
    flat = torch.cat(list(outputs))
    return flat[positions.argsort().to(flat.device)]
