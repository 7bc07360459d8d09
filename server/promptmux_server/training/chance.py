"""The randomness of a run: what a row draws depends on the run's seed, the step, the row's number and the place.

So neighbours in a batch change nothing, nor does which process has the row; a resumed run draws what it would have
drawn, and a layer that is computed twice leaves out the same twice. Nothing of it has to be saved.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PARTS = 2**16
"""A share to be dropped is so many of these; 0.2 is so 0.200002."""


@dataclass(frozen=True)
class Chance:
    """One run in one pass; `part` counts the batches of a step."""

    seed: int
    step: int
    part: int
    first: int = 0
    """Number in the batch of the first row here; `apart` is how far from it the next one is."""
    apart: int = 1

    def kept(self, row: int, shape: Sequence[int], dropped: float, place: str, device: torch.device) -> Tensor:
        """1 where a number is kept, 0 where it is dropped: uint8. `row` counts the rows that are here.

        Four numbers are decided by 64 random bits: PyTorch's own draw of as many takes five times as long.
        """
        generator = torch.Generator(device).manual_seed(self._number(row, place))
        words = torch.empty(-(-math.prod(shape) // 4), dtype=torch.int64, device=device)
        bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: math.prod(shape)]
        return (bits >= _parts(dropped) - 2**15).view(torch.uint8).view(tuple(shape))

    def _number(self, row: int, place: str) -> int:
        """32 bits, all that torch's CPU generator takes of a seed."""
        text = f"{self.seed} {self.step} {self.part} {self.first + row * self.apart} {place}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def scale(dropped: float) -> float:
    """What numbers that are kept are multiplied by, so that their mean stays what it was."""
    return PARTS / (PARTS - _parts(dropped))


def _parts(dropped: float) -> int:
    """A share as 16 bits can decide it."""
    return min(round(dropped * PARTS), PARTS - 1)
