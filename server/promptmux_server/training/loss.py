"""Label-smoothed cross-entropy as OFA trains with it (ofa-spec 9.1). Knows logits and targets only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Sums over target tokens, each a scalar tensor; divide by `tokens` for the mean that is optimised."""

    total: Tensor
    nll: Tensor
    tokens: int

    @property
    def mean(self) -> Tensor:
        return self.total / self.tokens


def label_smoothed_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    smoothing: float,
    allowed: Tensor | None = None,
    confidence: Tensor | None = None,
) -> Loss:
    """Loss of logits (T, V) against target ids (T,), in float32.

    `allowed` (T, V) bool restricts each position to the symbols that a closed answer set permits; `confidence` (T,)
    multiplies the log-probabilities of uncertain answers (VQA).
    """
    scores = logits.float()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    log_probs = scores.log_softmax(-1)
    if confidence is not None:
        log_probs = log_probs * confidence[:, None]
    nll = -log_probs.gather(1, targets[:, None])[:, 0]  # (T,)
    if allowed is None:
        smooth = -log_probs.sum(1)
        share: Tensor | float = smoothing / (logits.shape[1] - 1)
    else:
        smooth = -log_probs.masked_fill(~allowed, 0.0).sum(1)
        share = smoothing / (allowed.sum(1) - 1 + 1e-6)
    total = ((1.0 - smoothing - share) * nll + share * smooth).sum()
    return Loss(total, nll.sum(), targets.numel())
