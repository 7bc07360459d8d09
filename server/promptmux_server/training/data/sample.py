"""The nouns of training data: what one line of any format becomes, where it stands, and what may be wrong with it.

Knows no format, no tokens and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from promptmux_server.tasks.boxes import Box
from promptmux_server.training.data.pictures import Picture


@dataclass(frozen=True)
class Place:
    """Where a sample stands: a file's name, and a line (from 1) or an entry of a JSON document."""

    file: str
    line: int
    entry: str | None = None

    def __str__(self) -> str:
        return f"{self.file}, {self.entry or f'line {self.line}'}"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a user would send to a task, and the answer that the task should give."""

    target: str | Box
    """A caption, answer, label or text, or a box (x0, y0, x1, y1) in pixels of the stored picture."""
    picture: Picture | None = None
    text: str | None = None
    premise: str | None = None
    confidence: float = 1.0
    """How far the target is to be trusted, above 0 and at most 1."""
    references: Mapping[str, float] = field(default_factory=dict)
    """All texts that count as right, with what each is worth; empty: the target alone."""
    group: str
    """Samples of one group, mostly those about one picture, never stand on both sides of a split."""
    entry: str | None = None
    """Where the sample stands in a JSON document that was rewritten to lines."""


class Defect(ValueError):
    """One line that no sample can be made of. The message says what is wrong and what to do, without repeating it."""

    def __init__(self, reason: str, entry: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.entry = reason, entry


@dataclass(frozen=True)
class BadLine:
    """A defect and its place."""

    place: Place
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"
