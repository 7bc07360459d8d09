"""What the runner and a search say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from promptmux_server.tasks.decoding import Outcome


class NonFiniteLogits(Exception):
    """The model gave NaN or +Inf for this request: it fails, its neighbours don't."""


@dataclass(frozen=True)
class Step:
    """The rows to run next: row i feeds `tokens[i]` and descends from row `parents[i]` of the step before."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]


class Search(Protocol):
    """One request's search. The first call gets one row: the logits behind the decoder prefix."""

    @property
    def width(self) -> int:
        """The most rows that one step may ask for."""

    @property
    def most_tokens(self) -> int:
        """The most tokens that all its steps together feed, over all rows."""

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """The text so far, if it only ever grows; None for a search that may still choose another."""

    def advance(self, logits: Tensor) -> Step | None:
        """Take the logits (rows, V) float32 of the rows asked for last, to do with as it likes; None means finished.

        Raises NonFiniteLogits.
        """

    def outcome(self) -> Outcome:
        """What was found; call it once `advance` has returned None."""


def check_finite(logits: Tensor) -> None:
    """Raise NonFiniteLogits unless every logit is finite.

    Their sum is finite exactly if all are (below 1e33): one pass without a mask, 0.04 instead of 0.7 ms for five beams.
    """
    if not bool(torch.isfinite(logits.sum())):
        raise NonFiniteLogits
