"""What may be searched: an axis is a range of numbers or a list of values, a space is axes by field.

Owns how axes are written in a configuration. Whoever draws from them (`study`) is handed the axes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import PlainValidator

from promptmux_server.training.config_mistakes import no_such_field

Value = str | int | float | bool
"""Of one field in one trial; layers, which are lists, are the text that stands in the file: "[0, 2]"."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones if both are written so."""

    low: float
    high: float
    log: bool = False
    """Drawn evenly by their logarithm."""
    step: float | None = None

    @property
    def whole(self) -> bool:
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    @property
    def edges(self) -> tuple[Value, ...]:
        """Values that must be allowed for all to be."""
        return self.low, self.high


@dataclass(frozen=True)
class Choice:
    """One of these, in no order."""

    values: tuple[Value, ...]

    @property
    def edges(self) -> tuple[Value, ...]:
        return self.values


Axis = Range | Choice


def read_axis(written: Any) -> Axis:
    """An axis from what stands in the file; raises ValueError."""
    if isinstance(written, list):
        values = [json.dumps(value) if isinstance(value, list) else value for value in written]
        if not values or not all(isinstance(value, Value) for value in values) or len(set(values)) < len(values):
            raise ValueError("a list must hold different values, each a text, a number, true, false, or layers [0, 2]")
        return Choice(tuple(values))
    if isinstance(written, dict):
        return _range(written)
    if isinstance(written, Value):
        return Choice((written,))
    raise ValueError("write a value, a list of values, or { low = ..., high = ..., log = true }")


def as_in_a_section(value: Value | None) -> Any:
    """What stands for a value in the section of its field."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(json.JSONDecodeError):  # a text that only looks like a list is for the section to refuse
            return json.loads(value)
    return value


def _range(written: Mapping[str, Any]) -> Range:
    known = [field.name for field in fields(Range)]
    for key, value in written.items():
        if key not in known:
            raise ValueError(f"{key}: {no_such_field(key, known)}")
        if isinstance(value, bool) is not (key == "log") or not isinstance(value, int | float):
            raise ValueError(f"{key} must be {'true or false' if key == 'log' else 'a number'}")
    if not {"low", "high"} <= written.keys():
        raise ValueError("a range needs low and high")
    axis = Range(**written)
    if axis.low >= axis.high:
        raise ValueError("low must be below high")
    if axis.log and (axis.low <= 0 or axis.step is not None):
        raise ValueError("with log, low must be above 0 and there is no step")
    if axis.step is not None and axis.step <= 0:
        raise ValueError("step must be above 0")
    return axis


Space = Mapping[str, Annotated[Any, PlainValidator(read_axis)]]
"""`Axis` by field, in the order of the file."""
