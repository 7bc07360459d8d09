"""A search's passes over the logits of a vocabulary: how they are normalised, and the best next tokens of all its rows.

On a CPU the compiled form, several times as fast as PyTorch's selection; elsewhere, and without it, PyTorch. Not in
`dispatch`: there is no gradient through a choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from promptmux_kernels import cpu


def log_normalisers(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))) of each row of logits (R, V) float32: (R,)."""
    if not _compiled(logits):
        return logits.logsumexp(-1)
    out: Tensor = torch.ops.promptmux_cpu.log_normalisers(logits)
    return out


def top_tokens(logits: Tensor, normalisers: Tensor, before: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of (logits - normalisers) + before: scores of all rows, best first, places row * V + token.

    `normalisers` and `before` are (R,). Logits of -inf are never preferred to others.
    """
    if not _compiled(logits):
        best = ((logits - normalisers[:, None]) + before[:, None]).flatten().topk(count)
        return best.values, best.indices
    scores, places = torch.ops.promptmux_cpu.top_tokens(logits, normalisers, before, count)
    return scores, places


def _compiled(logits: Tensor) -> bool:
    return not logits.is_cuda and logits.stride(1) == 1 and cpu.available(torch.float32)
