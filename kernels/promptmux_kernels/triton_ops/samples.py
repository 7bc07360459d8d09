"""Calls with the shapes of real ones and random contents: what gets compiled, tuned, warmed up and timed.

Each function returns a call of one op, ready to be made again and again. Knows the ops' contracts and a model's widths;
nothing of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import promptmux_kernels as ops
from promptmux_kernels.rows import PAGE, Affine, BiasFactors, CrossMemory, PagedPrompts, Rows, SharedBias

Call = Callable[[], object]

BIAS_STEP = 32
"""Text positions of bias tables come in multiples of this, as the backbone builds them."""


@dataclass(frozen=True)
class Widths:
    """What of a model the kernels see."""

    heads: int
    head_dim: int
    ffn_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def d_model(self) -> int:
        return self.heads * self.head_dim

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def tokens(self, count: int) -> Tensor:
        return self.random(count, self.heads, self.head_dim)

    @property
    def head_scale(self) -> Tensor:
        return torch.ones(self.heads, device=self.device, dtype=self.dtype)

    @property
    def scale(self) -> float:
        return float((2 * self.head_dim) ** -0.5)


def encoder_attention(widths: Widths, lengths: Sequence[int], prompts: Sequence[int], *, factors: bool = False) -> Call:
    """Rows that look at pictures of one grid: one table of all their tokens."""
    return _self_attention(widths, lengths, prompts, causal=False, factors=factors)


def decoder_prefill(widths: Widths, lengths: Sequence[int], prompts: Sequence[int]) -> Call:
    return _self_attention(widths, lengths, prompts, causal=True, factors=False)


def _self_attention(
    widths: Widths, lengths: Sequence[int], prompts: Sequence[int], *, causal: bool, factors: bool
) -> Call:
    rows = Rows.packed(lengths)
    q, k, v = (widths.tokens(rows.total) for _ in range(3))
    pool = prompt_pool(widths, prompts)
    size = _rounded(max(lengths))
    dense = widths.random(widths.heads, size, size, dtype=torch.float32)
    packed = dense if causal else ops.pack_bias(dense, widths.dtype)  # only the encoder's tables are large
    table = bias_factors(widths, size) if factors else packed
    bias = SharedBias((table,), (0,) * len(rows))
    head_scale = widths.head_scale
    return lambda: ops.prefix_attention(
        q,
        k,
        v,
        rows=rows,
        prompts=pool,
        bias=bias,
        scale=widths.scale,
        head_scale=head_scale,
        causal=causal,
    )


def decode_step(widths: Widths, groups: int, beams: int, step: int, prompts: Sequence[int]) -> Call:
    rows = Rows.packed([beams] * groups)
    q = widths.tokens(rows.total)
    cache_key, cache_value = (widths.tokens(rows.total * step) for _ in range(2))
    history = torch.arange(rows.total * step, device=widths.device).view(step, rows.total).T.contiguous()
    pool = prompt_pool(widths, prompts)
    size = _rounded(step)
    bias = widths.random(widths.heads, size, size, dtype=torch.float32)
    head_scale = widths.head_scale
    return lambda: ops.prefix_decode_attention(
        q,
        groups=rows,
        prompts=pool,
        cache_key=cache_key,
        cache_value=cache_value,
        history=history,
        history_lengths=(step,) * groups,
        bias=bias,
        scale=widths.scale,
        head_scale=head_scale,
    )


def cross_step(widths: Widths, lengths: Sequence[int], beams: int, step: int) -> Call:
    return _cross(widths, lengths, beams, step - 1, consecutive=False)


def cross_prefill(widths: Widths, lengths: Sequence[int], tokens: int) -> Call:
    return _cross(widths, lengths, tokens, 0, consecutive=True)


def _cross(widths: Widths, lengths: Sequence[int], queries: int, first: int, *, consecutive: bool) -> Call:
    groups = Rows.packed([queries] * len(lengths))
    keys = Rows.packed(lengths)
    q = widths.tokens(groups.total)
    memory = CrossMemory(widths.tokens(keys.total), widths.tokens(keys.total), keys)
    positions = _rounded(first + queries)
    table = widths.random(widths.heads, positions, _rounded(max(lengths)), dtype=torch.float32)
    bias = SharedBias((table,), (0,) * len(groups))
    head_scale = widths.head_scale
    return lambda: ops.cross_decode_attention(
        q,
        groups=groups,
        memory=memory,
        bias=bias,
        first_positions=(first,) * len(groups),
        consecutive=consecutive,
        scale=widths.scale,
        head_scale=head_scale,
    )


def join_branches(widths: Widths, tokens: int) -> Call:
    x, y = (widths.random(tokens, widths.d_model) for _ in range(2))
    inner, outer = (_affine(widths, widths.d_model) for _ in range(2))
    return lambda: ops.norm_add_norm(x, y, inner, outer, 1e-5)


def feed_forward_norm(widths: Widths, tokens: int) -> Call:
    x, affine = widths.random(tokens, widths.ffn_dim), _affine(widths, widths.ffn_dim)
    return lambda: ops.gelu_norm(x, affine, 1e-5)


def store_tokens(widths: Widths, tokens: int) -> Call:
    cache_key, cache_value, key, value = (widths.tokens(tokens) for _ in range(4))
    slots = torch.arange(tokens, device=widths.device)
    return lambda: ops.write_cache(cache_key, cache_value, slots, key, value)


def prompt_pool(widths: Widths, lengths: Sequence[int]) -> PagedPrompts:
    """A prompt of its own for every row."""
    counts = [-(-length // PAGE) for length in lengths]
    spans = Rows.packed(counts)
    table = torch.zeros(len(lengths), max(1, *counts), dtype=torch.int64)
    for row, count in enumerate(counts):
        table[row, :count] = torch.arange(spans.starts[row], spans.starts[row] + count)
    key, value = (widths.random(max(1, spans.total), widths.heads, PAGE, widths.head_dim) for _ in range(2))
    return PagedPrompts(key, value, table.to(widths.device), tuple(lengths))


def bias_factors(widths: Widths, tokens: int) -> BiasFactors:
    code = torch.arange(tokens, dtype=torch.int32, device=widths.device)
    return BiasFactors(
        query=widths.random(widths.heads, tokens, widths.head_dim),
        key=widths.random(widths.heads, tokens, widths.head_dim),
        query_code=code + tokens - 1,
        key_code=-code,
        relative=widths.random(widths.heads, 2 * tokens - 1),
    )


def _affine(widths: Widths, width: int) -> Affine:
    return widths.random(width), widths.random(width)


def _rounded(length: int) -> int:
    return -(-length // BIAS_STEP) * BIAS_STEP
