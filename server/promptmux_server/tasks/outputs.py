"""Typed answers, told apart by `kind`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CaptionOutput:
    text: str
    kind: Literal["caption"] = "caption"


@dataclass(frozen=True)
class AnswerOutput:
    text: str
    kind: Literal["answer"] = "answer"


@dataclass(frozen=True)
class LabelOutput:
    """The most probable label; probabilities over all labels sum to one."""

    label: str
    probabilities: Mapping[str, float]
    kind: Literal["label"] = "label"


@dataclass(frozen=True)
class BoxOutput:
    """(x0, y0, x1, y1) in pixels of the picture that was sent."""

    box: tuple[float, float, float, float]
    kind: Literal["box"] = "box"


@dataclass(frozen=True)
class TextOutput:
    text: str
    kind: Literal["text"] = "text"


Output = CaptionOutput | AnswerOutput | LabelOutput | BoxOutput | TextOutput
