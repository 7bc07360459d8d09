"""How a pass differs in training: what it leaves out at random, and whether it computes layers twice to save memory.

Serving passes nothing of this. Owns no randomness: who is trained with which, and from which seed, the trainer knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from promptmux_kernels import Rows


class Drops(Protocol):
    """What is left out at one place. Asked in the same order again, it leaves out the same."""

    def elements(self, x: Tensor) -> Tensor:
        """Dropout: x (T, d_model) with single numbers zeroed and the rest scaled up."""
        ...

    def branches(self, x: Tensor) -> Tensor:
        """Stochastic depth: x (T, d_model), a branch's output, zeroed for whole rows and scaled up for the rest."""
        ...


class Noise(Protocol):
    """What is left out in one pass; `depth` of a layer rises from 0 (first) to 1 (last), as its drop-path rate does."""

    def at(self, place: str, depth: float, rows: Rows) -> Drops: ...


@dataclass(frozen=True)
class PassOptions:
    """`recompute`: keep only what enters a layer, and run the layer once more in the backward pass."""

    noise: Noise | None = None
    recompute: bool = False

    def drops(self, place: str, depth: float, rows: Rows) -> Drops | None:
        return None if self.noise is None else self.noise.at(place, depth, rows)

    def through(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """layer(x)."""
        if not self.recompute or not torch.is_grad_enabled():
            return layer(x)
        # Noise repeats itself by place, so the global random state need not be kept.
        out: Tensor = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
        return out


PLAIN_PASS = PassOptions()


def depth(index: int, layers: int) -> float:
    """Of layer `index`: 0 for the first, 1 for the last (ofa-spec 2.5)."""
    return index / max(1, layers - 1)
