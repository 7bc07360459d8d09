"""The randomness of a run: what a row draws depends on the run's seed, the step, the row's number and the place.

So neighbours in a batch change nothing, nor does which process has the row; a resumed run draws what it would have
drawn, and a layer that is computed twice leaves out the same twice. Nothing of it has to be saved.
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
    first: int = 0
    """Number in the batch of the first row here; `apart` is how far from it the next one is."""
    apart: int = 1

    def kept(self, row: int, shape: Sequence[int], dropped: float, place: str, like: Tensor) -> Tensor:
        """What multiplies numbers of which a share is dropped: 0, or 1 / (1 - dropped); device and type as `like`.

        `row` counts the rows that are here.
        """
        generator = torch.Generator(like.device).manual_seed(self._number(row, place))
        kept = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        return kept.bernoulli_(1.0 - dropped, generator=generator).div_(1.0 - dropped)

    def _number(self, row: int, place: str) -> int:
        """32 bits, all that torch's CPU generator takes of a seed."""
        text = f"{self.seed} {self.step} {self.part} {self.first + row * self.apart} {place}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
