"""Cross-attention: all queries of a request read the encoder's keys and values once, as one or two Triton kernels.

    out = head_scale[h] * softmax(scale * q K^T + B[h, p, :]) V

Query i of group g stands at decoder position p = first + i if CONSECUTIVE (prefill), else at p = first (a step: all
beams at one position, so one line of bias serves the tile). One program takes up to ROWS queries of a request, one head
and one chunk of keys. A batch that fills the device has one chunk per row and writes the answer at once; a small one is
cut into more (`splits`), each leaving its part of the softmax, which the second kernel merges:

    w_s = 2 ** (log2(sum(2 ** S_s)) - max),  out_s = softmax(S_s) V_s,  out = sum(w_s out_s) / sum(w_s)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from promptmux_kernels.rows import CrossMemory, Rows, SharedBias
from promptmux_kernels.triton_ops import configs, launch, plan
from promptmux_kernels.triton_ops.bias import parts
from promptmux_kernels.triton_ops.online import LOG2_E, empty, fold

MAX_CHUNKS = 32
"""Parts of a softmax that the merge takes at once: above the 29 key tiles of the largest picture (42 x 42)."""


@triton.jit(do_not_specialize=["queries"])
def cross_decode_kernel(
    q_ptr, out_ptr,  # (R, H, D), contiguous
    part_ptr, lse_ptr,  # (chunks, R, H, D) and (chunks, R, H) float32: written instead of out where SPLIT
    queries,  # R
    tiles,  # (tiles, 4): group, first query on the flat axis, queries, first query of the tile
    key_ptr, value_ptr, stride_key,  # (T, H, D)
    key_starts, key_lengths, first_positions,  # (G,) int32
    bias_fields,  # (G, 3) int64, see bias.BiasPart
    head_scale, scale,
    keys_per_chunk,
    HEADS: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    ELEMENT: tl.constexpr, CONSECUTIVE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    chunk = tl.program_id(2)
    group = tl.load(tiles + tile * 4)
    start = tl.load(tiles + tile * 4 + 1)
    n = tl.load(tiles + tile * 4 + 2)
    first = tl.load(tiles + tile * 4 + 3)
    key_start = tl.load(key_starts + group)
    begin = chunk * keys_per_chunk
    end = tl.minimum(begin + keys_per_chunk, tl.load(key_lengths + group))

    lane = tl.arange(0, LANES)
    query = first + tl.arange(0, ROWS)
    own = (query < n)[:, None] & (lane[None, :] < D)
    at = (start + query) * HEADS + head
    q = tl.load(q_ptr + at[:, None] * D + lane[None, :], mask=own, other=0.0)
    out, top, total = empty(ROWS, LANES)

    field = bias_fields + group * 3
    position = tl.load(first_positions + group)
    if CONSECUTIVE:
        position += tl.minimum(query, n - 1)
    bias = tl.load(field).to(tl.pointer_type(ELEMENT)) + tl.load(field + 1) * head
    line = position * tl.load(field + 2).to(tl.int32)
    own_key = key_ptr + key_start * stride_key + head * D
    own_value = value_ptr + key_start * stride_key + head * D
    for j in tl.range(begin, end, KEYS, num_stages=STAGES):
        key = j + tl.arange(0, KEYS)
        real = key < end
        k = tl.load(
            own_key + key[None, :] * stride_key + lane[:, None], mask=real[None, :] & (lane[:, None] < D), other=0.0
        )
        v = tl.load(
            own_value + key[:, None] * stride_key + lane[None, :], mask=real[:, None] & (lane[None, :] < D), other=0.0
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if CONSECUTIVE:
            scores += tl.load(bias + (line[:, None] + key[None, :]), mask=real[None, :], other=0.0).to(tl.float32)
        else:
            scores += tl.load(bias + line + key, mask=real, other=0.0).to(tl.float32)[None, :]
        out, top, total = fold(tl.where(real[None, :], scores * LOG2_E, float("-inf")), v, out, top, total)

    if SPLIT:
        # A chunk behind a short row's end has total 0 and so an lse of -inf: it will weigh nothing.
        at += chunk * queries * HEADS
        safe_total = tl.where(total == 0.0, 1.0, total)
        tl.store(part_ptr + at[:, None] * D + lane[None, :], out / safe_total[:, None], mask=own)
        tl.store(lse_ptr + at, top + tl.log2(safe_total), mask=query < n)
    else:
        weight = tl.load(head_scale + head).to(tl.float32) / total
        tl.store(
            out_ptr + at[:, None] * D + lane[None, :], (out * weight[:, None]).to(out_ptr.dtype.element_ty), mask=own
        )


@triton.jit(do_not_specialize=["queries", "chunks"])
def merge_chunks_kernel(
    part_ptr, lse_ptr, out_ptr, head_scale,
    queries, chunks,
    HEADS: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    head = tl.program_id(1)
    chunk = tl.arange(0, CHUNKS)
    lane = tl.arange(0, LANES)
    at = (chunk * queries + query) * HEADS + head
    lse = tl.load(lse_ptr + at, mask=chunk < chunks, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    read = (lse != float("-inf"))[:, None] & (lane[None, :] < D)
    part = tl.load(part_ptr + at[:, None] * D + lane[None, :], mask=read, other=0.0)
    merged = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0) * tl.load(head_scale + head).to(tl.float32)
    tl.store(out_ptr + (query * HEADS + head) * D + lane, merged.to(out_ptr.dtype.element_ty), mask=lane < D)


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
    """`dispatch.cross_decode_attention` on a GPU."""
    assert memory.layout == "plain", "another form packed this memory"
    assert memory.key.stride() == memory.value.stride(), "K and V of a memory are laid out alike"
    assert launch.is_by_heads(memory.key)
    q = q.contiguous()
    out = torch.empty_like(q)
    (part,) = parts(bias, q.device)  # a batch's cross tables are dense and of one type
    assert part.kind == "dense"
    op = "cross_prefill_attention" if consecutive else "cross_decode_attention"
    longest = max(memory.rows.lengths)
    config = configs.choose(op, q, longest=longest)
    tiles = plan.tiles(groups, part.rows, config.rows, q.device)
    key_tiles = -(-longest // config.keys)
    chunks = splits(tiles.shape[0] * q.shape[1], key_tiles, launch.processors(q.device))
    tiles_per_chunk = -(-key_tiles // chunks)
    chunks = -(-key_tiles // tiles_per_chunk)
    size = chunks if chunks > 1 else 0
    partial = torch.empty(size, *q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(size, *q.shape[:2], dtype=torch.float32, device=q.device)
    shape = {"HEADS": q.shape[1], "D": q.shape[2], "LANES": launch.lanes(q)}
    launch.run(
        cross_decode_kernel,
        (tiles.shape[0], q.shape[1], chunks),
        config,
        q_ptr=q,
        out_ptr=out,
        part_ptr=partial,
        lse_ptr=lse,
        queries=q.shape[0],
        tiles=tiles,
        key_ptr=memory.key,
        value_ptr=memory.value,
        stride_key=memory.key.stride(0),
        key_starts=plan.integers(memory.rows.starts, q.device),
        key_lengths=plan.integers(memory.rows.lengths, q.device),
        first_positions=plan.integers(first_positions, q.device),
        bias_fields=part.fields,
        head_scale=head_scale,
        scale=scale,
        keys_per_chunk=tiles_per_chunk * config.keys,
        **shape,
        ROWS=config.rows,
        KEYS=config.keys,
        STAGES=config.stages,
        ELEMENT=launch.element(part.element),
        CONSECUTIVE=consecutive,
        SPLIT=chunks > 1,
    )
    if chunks > 1:
        launch.run(
            merge_chunks_kernel,
            (q.shape[0], q.shape[1]),
            configs.MERGE,
            part_ptr=partial,
            lse_ptr=lse,
            out_ptr=out,
            head_scale=head_scale,
            queries=q.shape[0],
            chunks=chunks,
            **shape,
            CHUNKS=MAX_CHUNKS,
        )
    return out


def splits(programs: int, key_tiles: int, processors: int) -> int:
    """Into how many chunks to cut the keys (FlashAttention 3's rule): none while the programs fill 0.8 of the device or
    a row has at most 4 key tiles; else the fewest whose last wave is at least 85 % as full as the best choice's.
    """
    if programs >= 0.8 * processors or key_tiles <= 4:
        return 1

    def filled(chunks: int) -> float:
        waves = programs * chunks / processors
        return waves / -(-programs * chunks // processors)

    choices = range(1, min(key_tiles, processors, MAX_CHUNKS) + 1)
    enough = 0.85 * max(filled(chunks) for chunks in choices)
    return next(chunks for chunks in choices if filled(chunks) >= enough)
