"""Dropout and stochastic depth of the frozen backbone in a batch of many runs, each with its own rates and chance.

Knows the order of rows (a run's rows lie together); nothing of prompts or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from promptmux_kernels import Rows
from promptmux_server.training.chance import Chance, scale


@dataclass(frozen=True)
class RunNoise:
    """What one run leaves out, and how many of the batch's rows are its own."""

    chance: Chance
    rows: int
    dropout: float
    drop_path: float


class BatchNoise:
    """The backbone's `Noise` of a batch whose rows follow the order of `runs`."""

    def __init__(self, runs: Sequence[RunNoise]) -> None:
        self._runs = runs

    @property
    def silent(self) -> bool:
        """Whether nothing would be left out."""
        return not any(run.dropout or run.drop_path for run in self._runs)

    def at(self, place: str, depth: float, rows: Rows) -> PlaceNoise:
        return PlaceNoise(self._runs, place, depth, rows)


@dataclass
class PlaceNoise:
    """The backbone's `Drops` of one place."""

    runs: Sequence[RunNoise]
    place: str
    depth: float
    rows: Rows
    asked: int = field(default=0, init=False)
    """Times so far: a layer asks more than once, and each time means another draw."""

    def elements(self, x: Tensor) -> Tensor:
        here, lengths = self._here(), iter(self.rows.lengths)
        masks = [
            run.chance.kept(row, (next(lengths), x.shape[1]), run.dropout, here, x.device)
            * x.new_tensor(scale(run.dropout))
            for run in self.runs
            for row in range(run.rows)
        ]
        return x * torch.cat(masks)

    def branches(self, x: Tensor) -> Tensor:
        here = self._here()
        kept = [
            run.chance.kept(row, (1,), dropped, here, x.device) * x.new_tensor(scale(dropped))
            for run, dropped in ((run, run.drop_path * self.depth) for run in self.runs)
            for row in range(run.rows)
        ]
        lengths = torch.tensor(self.rows.lengths, device=x.device)
        return x * torch.cat(kept).repeat_interleave(lengths)[:, None]

    def _here(self) -> str:
        self.asked += 1
        return f"{self.place} {self.asked}"
