"""The prompt's share of an attention: pages of one request, read in place. Knows nothing of whose they are.

One page is one key tile, so a tile needs one scalar page number (a gather per column takes 6 registers more on sm_90).
What lies behind the prompt's end in its last page is never loaded: it may belong to nobody and hold anything.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from promptmux_kernels.rows import PAGE, PagedPrompts
from promptmux_kernels.triton_ops import launch, plan
from promptmux_kernels.triton_ops.online import fold


@triton.jit
def fold_prompt(
    q, out, top, total, scale,
    page_key, page_value, stride_page, stride_page_head, pages, length, head,
    D: tl.constexpr, LANES: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Fold the `length` positions of a prompt into the state; `pages` points at the row's first page number."""
    lane = tl.arange(0, LANES)
    position = tl.arange(0, PAGE)
    for page in range(tl.cdiv(length, PAGE)):
        base = tl.load(pages + page) * stride_page + head * stride_page_head
        real = position < length - page * PAGE
        k = tl.load(
            page_key + base + position[None, :] * D + lane[:, None], mask=real[None, :] & (lane[:, None] < D), other=0.0
        )
        v = tl.load(
            page_value + base + position[:, None] * D + lane[None, :],
            mask=real[:, None] & (lane[None, :] < D),
            other=0.0,
        )
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        out, top, total = fold(tl.where(real[None, :], scores, float("-inf")), v.to(q.dtype), out, top, total)
    return out, top, total


def arguments(prompts: PagedPrompts | None, rows: int, like: Tensor) -> dict[str, Any]:
    """The kernel's prompt arguments; without prompts every length is 0 and the other pointers are never followed."""
    if prompts is None:
        return {
            "page_key": like,
            "page_value": like,
            "stride_page": 0,
            "stride_page_head": 0,
            "page_table": plan.fields(((0,),), like.device),
            "stride_page_table": 0,
            "prompt_lengths": plan.integers((0,) * rows, like.device),
        }
    key, value, table = prompts.key, prompts.value, prompts.table
    assert key.shape[2] == PAGE, "a page is one key tile"
    assert key.stride() == value.stride(), "K and V of a pool are laid out alike"
    assert key.stride()[2:] == (key.shape[3], 1), "positions of a page lie next to one another"
    assert table.dtype == torch.int64
    assert launch.lies_along_lines(table)
    return {
        "page_key": key,
        "page_value": value,
        "stride_page": key.stride(0),
        "stride_page_head": key.stride(1),
        "page_table": table,
        "stride_page_table": table.stride(0),
        "prompt_lengths": plan.integers(prompts.lengths, like.device),
    }
