"""Label-smoothed cross-entropy as OFA trains with it (ofa-spec 9.1). Knows logits and targets only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Sums over the target tokens that were kept, each a scalar tensor; divide by `tokens` for the optimised mean."""

    total: Tensor
    nll: Tensor
    tokens: int

    @property
    def mean(self) -> Tensor:
        return self.total / self.tokens


@dataclass(frozen=True)
class LossNumbers:
    """A loss off the device, or the sum of several."""

    total: float
    nll: float
    tokens: int

    def plus(self, other: LossNumbers) -> LossNumbers:
        return LossNumbers(self.total + other.total, self.nll + other.nll, self.tokens + other.tokens)


NO_LOSS = LossNumbers(0.0, 0.0, 0)


def label_smoothed_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    smoothing: float,
    allowed: Tensor | None = None,
    confidence: Tensor | None = None,
    drop_worst: float = 0.0,
) -> Loss:
    """Loss of logits (T, V) against target ids (T,), in float32.

    `allowed` (T, V) bool restricts each position to the symbols that a closed answer set permits; `confidence` (T,)
    multiplies the log-probabilities of uncertain answers (VQA). `drop_worst` is the share of tokens, those with the
    largest loss, that count for nothing; one token is always kept.
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
    loss = (1.0 - smoothing - share) * nll + share * smooth  # (T,)
    if drop_worst > 0.0:
        # What is not finite is a fault to be seen, not a bad token to be dropped.
        order = loss.detach().nan_to_num(nan=-torch.inf, posinf=-torch.inf)
        kept = order.topk(max(1, int(len(loss) * (1.0 - drop_worst))), largest=False).indices
        loss, nll = loss[kept], nll[kept]
    return Loss(loss.sum(), nll.sum(), len(loss))
