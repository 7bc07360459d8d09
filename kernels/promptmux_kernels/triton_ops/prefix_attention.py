"""Self-attention of ragged rows, each behind its own prompt, as one Triton kernel.

For row r with tokens Q, K, V (n, D) of a head h, prompt PK, PV (P, D) and bias B (n, n):

    S = [scale * Q PK^T, scale * Q K^T + B]
    out = head_scale[h] * softmax(S) [PV; V]
    lse = log(sum(exp(S)))

One program takes a tile of queries of one row and head: first the prompt's pages, without bias, then the row's own
keys, with bias, in one running softmax; nothing is padded and nothing is merged afterwards. The bias is one table for
all rows of a kind, so its lines come from L2 for all rows but the first; it reaches the scores in one of three ways:

    pointer     B[h, i, j] loaded by 16-byte vectors where its lines are aligned
    descriptor  the same through the copy engine of sm_90 and later: 6 registers, zero outside of the row's block
    factors     query . key + relative[query_code + key_code]: a second product and a gather, where tables are too many

Head dim 80 runs in 128 lanes, masked: splitting it into 64 + 16 would save 6 % of a whole OFA-huge prefill (114 of
1160 GF are attention) for a second copy of every load and product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from promptmux_kernels.rows import PAGE, PagedPrompts, Rows, SharedBias
from promptmux_kernels.triton_ops import configs, launch, plan, prompt
from promptmux_kernels.triton_ops.bias import VECTOR_BYTES, BiasPart, parts
from promptmux_kernels.triton_ops.online import LN_2, LOG2_E, empty, fold
from promptmux_kernels.triton_ops.prompt import fold_prompt


@triton.jit(do_not_specialize=["stride_page_table"])
def prefix_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,  # (T, H, D), out contiguous; (T, H) float32
    stride_q, stride_k, stride_v,  # from token to token
    tiles,  # (tiles, 4): row, first token, tokens, first query
    page_key, page_value, stride_page, stride_page_head, page_table, stride_page_table, prompt_lengths,
    bias_fields,  # (B, 3 or 7) int64, see bias.BiasPart
    head_scale, scale,
    HEADS: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, ELEMENT: tl.constexpr, VECTOR: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(tiles + tile * 4)
    start = tl.load(tiles + tile * 4 + 1)
    n = tl.load(tiles + tile * 4 + 2)
    first = tl.load(tiles + tile * 4 + 3)

    lane = tl.arange(0, LANES)
    column = tl.arange(0, KEYS)
    query = first + tl.arange(0, ROWS)
    safe_query = tl.minimum(query, n - 1)  # lines of the bias are read unmasked: a clamped line is a real one
    real_query = query < n
    q = tl.load(
        q_ptr + start * stride_q + head * D + query[:, None] * stride_q + lane[None, :],
        mask=real_query[:, None] & (lane[None, :] < D),
        other=0.0,
    )
    out, top, total = empty(ROWS, LANES)
    out, top, total = fold_prompt(
        q, out, top, total, scale * LOG2_E,
        page_key, page_value, stride_page, stride_page_head,
        page_table + row * stride_page_table, tl.load(prompt_lengths + row), head,
        D, LANES, PAGE,
    )  # fmt: skip

    if BIAS == "factors":
        field = bias_fields + row * 7
        tokens = tl.load(field + 5)
        size = tl.load(field + 6).to(tl.int32)
        side = head * tokens * D
        position_query = tl.load(field).to(tl.pointer_type(ELEMENT)) + side
        position_key = tl.load(field + 1).to(tl.pointer_type(ELEMENT)) + side
        position_query = tl.multiple_of(position_query, 16)
        position_key = tl.multiple_of(position_key, 16)
        query_code = tl.load(tl.load(field + 2).to(tl.pointer_type(tl.int32)) + safe_query)
        key_code = tl.load(field + 3).to(tl.pointer_type(tl.int32))
        relative = tl.load(field + 4).to(tl.pointer_type(ELEMENT)) + head * size
        pq = tl.load(position_query + safe_query[:, None] * D + lane[None, :], mask=lane[None, :] < D, other=0.0)
    else:
        field = bias_fields + row * 3
        bias_pitch = tl.multiple_of(tl.load(field + 2).to(tl.int32), VECTOR)
        bias_head = tl.multiple_of(tl.load(field + 1), VECTOR) * head
        bias = tl.load(field).to(tl.pointer_type(ELEMENT)) + bias_head
        if VECTOR > 1:
            bias = tl.multiple_of(bias, 16)
        if BIAS == "descriptor":
            table = tl.make_tensor_descriptor(bias, [n, n], [bias_pitch.to(tl.int64), 1], [ROWS, KEYS])
        line = safe_query * bias_pitch
        # Whole vectors may be read: they end inside the line, whose pitch is a multiple of them.
        readable = tl.multiple_of(tl.cdiv(n, VECTOR) * VECTOR, VECTOR)

    own_key = k_ptr + start * stride_k + head * D
    own_value = v_ptr + start * stride_v + head * D
    end = tl.minimum(n, first + ROWS) if CAUSAL else n
    for j in tl.range(0, end, KEYS, num_stages=STAGES):
        key = j + column
        real = key < n
        k = tl.load(
            own_key + key[None, :] * stride_k + lane[:, None], mask=real[None, :] & (lane[:, None] < D), other=0.0
        )
        v = tl.load(
            own_value + key[:, None] * stride_v + lane[None, :], mask=real[:, None] & (lane[None, :] < D), other=0.0
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if BIAS == "factors":
            pk = tl.load(
                position_key + key[None, :] * D + lane[:, None], mask=real[None, :] & (lane[:, None] < D), other=0.0
            )
            scores = tl.dot(pq, pk, scores, input_precision="ieee")
            code = query_code[:, None] + tl.load(key_code + key, mask=real, other=0)[None, :]
            scores += tl.load(relative + code, mask=(code >= 0) & (code < size), other=0.0).to(tl.float32)
        elif BIAS == "descriptor":
            scores += table.load([first, j]).to(tl.float32)
        else:
            scores += tl.load(
                bias + j + (line[:, None] + column[None, :]), mask=(key < readable)[None, :], other=0.0
            ).to(tl.float32)
        seen = real[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= query[:, None])
        out, top, total = fold(tl.where(seen, scores * LOG2_E, float("-inf")), v, out, top, total)

    weight = tl.load(head_scale + head).to(tl.float32) / total
    tl.store(
        out_ptr + (start * HEADS + head) * D + query[:, None] * (HEADS * D) + lane[None, :],
        (out * weight[:, None]).to(out_ptr.dtype.element_ty),
        mask=real_query[:, None] & (lane[None, :] < D),
    )
    tl.store(lse_ptr + start * HEADS + head + query * HEADS, (top + tl.log2(total)) * LN_2, mask=real_query)


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
    """`dispatch.prefix_attention` on a GPU."""
    q, k, v = (launch.by_heads(x) for x in (q, k, v))
    covered = rows.total == q.shape[0]
    out = (torch.empty if covered else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    lse = (torch.empty if covered else torch.zeros)(q.shape[:2], dtype=torch.float32, device=q.device)
    shared = prompt.arguments(prompts, len(rows), q)
    for part in parts(bias, q.device):
        config = _config(q, rows, part)
        tiles = plan.tiles(rows, part.rows, config.rows, q.device)
        launch.run(
            prefix_attention_kernel,
            (tiles.shape[0], q.shape[1]),
            config,
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            out_ptr=out,
            lse_ptr=lse,
            stride_q=q.stride(0),
            stride_k=k.stride(0),
            stride_v=v.stride(0),
            tiles=tiles,
            **shared,
            bias_fields=part.fields,
            head_scale=head_scale,
            scale=scale,
            HEADS=q.shape[1],
            D=q.shape[2],
            LANES=launch.lanes(q),
            PAGE=PAGE,
            ROWS=config.rows,
            KEYS=config.keys,
            STAGES=config.stages,
            BIAS=_bias_path(part, config),
            ELEMENT=launch.element(part.element),
            VECTOR=VECTOR_BYTES // part.element.itemsize if part.aligned else 1,
            CAUSAL=causal,
        )
    return out, lse


def _config(q: Tensor, rows: Rows, part: BiasPart) -> configs.Config:
    op = "prefix_attention" if part.kind == "dense" else "prefix_attention_factors"
    return configs.choose(op, q, longest=max(rows.lengths[row] for row in part.rows))


def _bias_path(part: BiasPart, config: configs.Config) -> str:
    if part.kind == "factors":
        return "factors"
    return "descriptor" if config.descriptor and part.aligned else "pointer"
