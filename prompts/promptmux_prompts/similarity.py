"""How alike two prompts are, whatever their lengths, and which of many are nearest to one.

    m(p)      the keys and values of all layers and heads of p, each averaged over its positions, as one long vector;
              zeros where p lacks a side
    cosine    m(a) . m(b) / (|m(a)| |m(b)|)

Averages, because prompts differ in length, and because attention does not know in which order a prompt's positions
stand: a prompt and its shuffled copy do the same, and have cosine 1. Prompts of different backbones are not compared,
since their numbers mean different things.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from promptmux_prompts.format import Prompt


@dataclass(frozen=True)
class Neighbour:
    """A prompt that was compared."""

    name: str
    sha256: str
    cosine: float


@dataclass(frozen=True)
class Nearest:
    """The outcome of a search."""

    neighbours: tuple[Neighbour, ...]
    """The most alike first."""
    compared: int
    incomparable: int
    """Prompts of another backbone, and prompts without any side in common."""


def nearest(prompt: Prompt, others: Iterable[Prompt], k: int = 3) -> Nearest:
    """The `k` most alike of `others`, which are looked at one at a time; the prompt itself, by digest, is left out."""
    own = _Means.of(prompt)
    incomparable = compared = 0

    def neighbours() -> Iterator[Neighbour]:
        nonlocal incomparable, compared
        for other in others:
            if other.digest == prompt.digest:
                continue
            cosine = own.cosine(_Means.of(other))
            if cosine is None:
                incomparable += 1
            else:
                compared += 1
                yield Neighbour(other.manifest.name, other.digest, cosine)

    best = heapq.nlargest(k, neighbours(), key=lambda neighbour: neighbour.cosine)
    return Nearest(tuple(best), compared, incomparable)


def similarity(a: Prompt, b: Prompt) -> float | None:
    """The cosine; None if the two are not comparable."""
    return _Means.of(a).cosine(_Means.of(b))


@dataclass(frozen=True, eq=False)
class _Means:
    """Averages over positions, (2, layers, H, D) by side."""

    fingerprint: str
    sides: dict[str, Tensor]

    @classmethod
    def of(cls, prompt: Prompt) -> _Means:
        sides = {
            "encoder": (prompt.encoder_key, prompt.encoder_value),
            "decoder": (prompt.decoder_key, prompt.decoder_value),
        }
        means = {
            side: torch.stack([key, value]).double().mean(dim=3) for side, (key, value) in sides.items() if key.shape[2]
        }
        return cls(prompt.manifest.fingerprint, means)

    def cosine(self, other: _Means) -> float | None:
        common = self.sides.keys() & other.sides.keys()
        same_shape = all(self.sides[side].shape == other.sides[side].shape for side in common)
        if self.fingerprint != other.fingerprint or not common or not same_shape:
            return None
        product = sum(float((self.sides[side] * other.sides[side]).sum()) for side in common)
        norms = self._norm() * other._norm()
        return product / norms if norms else None

    def _norm(self) -> float:
        return math.sqrt(sum(float(mean.square().sum()) for mean in self.sides.values()))
