"""What is known of a trial: the noun that the search, its report and its plots share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from promptmux_server.training.search.space import Value

State = Literal["running", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class TrialRecord:
    """A trial as the journal has it."""

    number: int
    """From 0, in the order of their drawing."""
    state: State
    values: Mapping[str, Value]
    """Of the fields that are searched."""
    scores: Mapping[int, float]
    """By step."""
    score: float | None
    """The highest so far; None where there is none."""
    reason: str | None
    """Why it failed."""
    joined: int
    """When, on the search's clock: the steps that the search has taken."""

    @property
    def name(self) -> str:
        """Of its folder, and of its run."""
        return f"{self.number:04d}"


def best_of(trials: Iterable[TrialRecord]) -> TrialRecord | None:
    """The complete trial of the highest score, the earliest of equal ones."""
    complete = [(trial.score, -trial.number, trial) for trial in trials if trial.state == "complete"]
    scored = [(score, age, trial) for score, age, trial in complete if score is not None]
    return max(scored, default=(0.0, 0, None))[2]
