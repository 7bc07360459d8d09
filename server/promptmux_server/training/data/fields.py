"""Checks of single values, shared by the formats. Each says what a value must be, never what it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from promptmux_prompts import Kind
from promptmux_server.tasks.boxes import Box
from promptmux_server.training.data.sample import Defect

TARGET_FIELD: Mapping[Kind, str] = {
    "caption": "caption",
    "answer": "answer",
    "label": "label",
    "box": "box",
    "text": "answer",
}
"""The field of a JSON line that holds what a task of this kind should say."""


def text_of(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Defect(f"{name} must be a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Defect(f"{name} holds half a character (a lone surrogate): mend its encoding") from error
    return value.strip()


def confidence_of(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise Defect(f"{name} must be a number above 0, and at most 1")
    return float(value)


def box_of(name: str, values: Any) -> Box:
    """(x0, y0, x1, y1) in pixels; whether it lies in its picture is not known here."""
    numbers = _numbers(values)
    if len(numbers) != 4 or not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        raise Defect(f"{name} must be four numbers [x0, y0, x1, y1] in pixels, with x0 < x1 and y0 < y1")
    return (numbers[0], numbers[1], numbers[2], numbers[3])


def corners_of(name: str, values: Any) -> Box:
    """The box of COCO's [x, y, width, height]."""
    numbers = _numbers(values)
    if len(numbers) != 4 or min(numbers[2:]) <= 0.0:
        raise Defect(f"{name} must be four numbers [x, y, width, height] in pixels, with a width and height above 0")
    x, y, width, height = numbers
    return (x, y, x + width, y + height)


def best_of(references: Mapping[str, float]) -> tuple[str, float]:
    """The reference of highest worth, the first of several."""
    return max(references.items(), key=lambda item: item[1])


def _numbers(values: Any) -> Sequence[float]:
    """The values if they are finite numbers, else none."""
    fine = isinstance(values, list | tuple) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )
    return [float(value) for value in values] if fine else []
