"""One decoding step of self-attention, all beams of a request in one tile, as one Triton kernel.

Group g is at step t; beam b of it sees its prompt and the cache slots S = history[b, :t], its own new token last:

    out = head_scale[h] * softmax([scale * q PK^T, scale * q K^T + bias[h, t-1, :t]]) [PV; V]

with K, V = cache_key[S], cache_value[S]. One program takes up to 16 beams of a request and one head, so that the prompt
is read once for all of them. The histories of the beams lie side by side as (step, beam) columns of the same tiles; a
beam keeps the columns that are its own and masks the rest: at beam 5 and step 16 that is two key tiles, where a loop
over beams would be a chain of five. Beams reorder by naming other slots in `history`; nothing is ever moved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from promptmux_kernels.rows import PAGE, PagedPrompts, Rows
from promptmux_kernels.triton_ops import configs, launch, plan, prompt
from promptmux_kernels.triton_ops.online import LOG2_E, empty, fold
from promptmux_kernels.triton_ops.prompt import fold_prompt


@triton.jit(do_not_specialize=["stride_history", "stride_page_table", "stride_bias_head", "stride_bias_step"])
def prefix_decode_kernel(
    q_ptr, out_ptr,  # (R, H, D), contiguous
    tiles,  # (tiles, 4): group, first beam on the flat axis, beams, first beam of the tile
    page_key, page_value, stride_page, stride_page_head, page_table, stride_page_table, prompt_lengths,
    cache_key, cache_value, stride_slot,  # (slots, H, D)
    history, stride_history, steps,  # (R, T_max) int64; (G,) int32
    bias, stride_bias_head, stride_bias_step,  # (H, T, T)
    head_scale, scale,
    HEADS: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    group = tl.load(tiles + tile * 4)
    first = tl.load(tiles + tile * 4 + 3)
    start = tl.load(tiles + tile * 4 + 1) + first
    beams = tl.minimum(tl.load(tiles + tile * 4 + 2) - first, ROWS)
    t = tl.load(steps + group)

    lane = tl.arange(0, LANES)
    beam = tl.minimum(tl.arange(0, ROWS), beams - 1)  # the tile is filled up with its last beam
    at = ((start + beam) * HEADS + head)[:, None] * D + lane[None, :]
    q = tl.load(q_ptr + at, mask=lane[None, :] < D, other=0.0)
    out, top, total = empty(ROWS, LANES)
    out, top, total = fold_prompt(
        q, out, top, total, scale * LOG2_E,
        page_key, page_value, stride_page, stride_page_head,
        page_table + group * stride_page_table, tl.load(prompt_lengths + group), head,
        D, LANES, PAGE,
    )  # fmt: skip

    bias_line = bias + head * stride_bias_head + (t - 1) * stride_bias_step
    for c in tl.range(0, t * beams, KEYS, num_stages=STAGES):
        column = c + tl.arange(0, KEYS)
        real = column < t * beams
        owner = column % beams
        step = column // beams
        slot = tl.load(history + (start + owner) * stride_history + step, mask=real, other=0)
        base = slot * stride_slot + head * D
        k = tl.load(cache_key + base[None, :] + lane[:, None], mask=real[None, :] & (lane[:, None] < D), other=0.0)
        v = tl.load(cache_value + base[:, None] + lane[None, :], mask=real[:, None] & (lane[None, :] < D), other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores += tl.load(bias_line + step, mask=real, other=0.0).to(tl.float32)[None, :]
        # A beam multiplies its siblings' values by zero, and 0 * NaN is NaN: a column with a value that is not finite
        # is zeroed, and its owner alone made NaN.
        finite = tl.abs(v.to(tl.float32)) < float("inf")
        broken = tl.min(finite.to(tl.int32), 1) == 0
        scores = tl.where(broken[None, :], float("nan"), scores)
        mine = real[None, :] & (owner[None, :] == beam[:, None])
        scores = tl.where(mine, scores * LOG2_E, float("-inf"))
        out, top, total = fold(scores, tl.where(finite, v, 0.0), out, top, total)

    weight = tl.load(head_scale + head).to(tl.float32) / total
    own = (tl.arange(0, ROWS) < beams)[:, None] & (lane[None, :] < D)
    tl.store(out_ptr + at, (out * weight[:, None]).to(out_ptr.dtype.element_ty), mask=own)


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
    """`dispatch.prefix_decode_attention` on a GPU."""
    q = q.contiguous()
    assert cache_key.stride() == cache_value.stride(), "K and V of a cache are laid out alike"
    assert launch.is_by_heads(cache_key)
    assert history.dtype == torch.int64
    assert launch.lies_along_lines(history)
    assert launch.lies_along_lines(bias)
    out = torch.empty_like(q)
    config = configs.choose("prefix_decode_attention", q, longest=max(history_lengths))
    tiles = plan.tiles(groups, tuple(range(len(groups))), config.rows, q.device)
    launch.run(
        prefix_decode_kernel,
        (tiles.shape[0], q.shape[1]),
        config,
        q_ptr=q,
        out_ptr=out,
        tiles=tiles,
        **prompt.arguments(prompts, len(groups), q),
        cache_key=cache_key,
        cache_value=cache_value,
        stride_slot=cache_key.stride(0),
        history=history,
        stride_history=history.stride(0),
        steps=plan.integers(history_lengths, q.device),
        bias=bias,
        stride_bias_head=bias.stride(0),
        stride_bias_step=bias.stride(1),
        head_scale=head_scale,
        scale=scale,
        HEADS=q.shape[1],
        D=q.shape[2],
        LANES=launch.lanes(q),
        PAGE=PAGE,
        ROWS=config.rows,
        KEYS=config.keys,
        STAGES=config.stages,
    )
    return out
