"""The randomness of a run: what it draws depends on its seed, its step and the place that draws, on nothing else.

So neighbours in a batch change nothing, a resumed run draws what it would have drawn, and a layer that is computed
twice leaves out the same twice. Nothing of it has to be saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chance:
    """One run in one pass; `part` counts the batches of a step."""

    seed: int
    step: int
    part: int

    def kept(self, shape: Sequence[int], dropped: float, place: str, like: Tensor) -> Tensor:
        """What multiplies numbers of which a share is dropped: 0, or 1 / (1 - dropped); device and type as `like`."""
        generator = torch.Generator(like.device).manual_seed(self._number(place))
        kept = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        return kept.bernoulli_(1.0 - dropped, generator=generator).div_(1.0 - dropped)

    def _number(self, place: str) -> int:
        """32 bits, all that torch's CPU generator takes of a seed."""
        text = f"{self.seed} {self.step} {self.part} {place}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
