"""The running softmax that every attention kernel shares, in base 2. Knows scores and values; not where they lie.

state over the tiles seen so far:  top = max(S),  total = sum(2 ** (S - top)),  out = sum(2 ** (S - top) * V)
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def empty(ROWS: tl.constexpr, LANES: tl.constexpr):
    """The state before any key: (out, top, total)."""
    out = tl.zeros([ROWS, LANES], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    return out, top, total


@triton.jit
def fold(scores, value, out, top, total):
    """Take one key tile in: scores (ROWS, KEYS) in base 2, -inf where masked; value (KEYS, LANES), zero there."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet: -inf - -inf is NaN
    keep = tl.exp2(top - safe_top)
    weights = tl.exp2(scores - safe_top[:, None])
    total = total * keep + tl.sum(weights, 1)
    out = tl.dot(weights.to(value.dtype), value, out * keep[:, None], input_precision="ieee")
    return out, new_top, total
