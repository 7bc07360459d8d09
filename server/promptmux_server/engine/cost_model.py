"""What a request costs: milliseconds of the device, as a line per stage that measurements keep up to date.

Owns the lines, how wrong they have been, and how long each task's answers are. Knows nothing of clocks or tensors: the
engine measures. Pure Python. `observe` and `learn_steps` are for one thread, everything else for any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Stage = Literal["stem", "encode", "step"]
"""Counted in: pictures; encoder tokens, decoder prefixes run in their pass; rows (live beams) of a step."""

STAGES: tuple[Stage, ...] = ("stem", "encode", "step")

MEMORY = 0.98
"""Weight of a measurement after the next one: the last 50 carry the fit."""
ERROR_MEMORY = 0.95
STEPS_MEMORY = 0.9
TURN_MEMORY = 0.95
MAX_SURPRISE = 10.0
"""No measurement counts for more than so many times what was expected: one compilation must not own the fit."""
MIN_SPREAD = 1e-2
"""Variance of the counts, over their squared mean, below which they do not tell a constant from a slope."""


@dataclass(frozen=True)
class Line:
    """Milliseconds of one pass: `constant_ms + slope_ms * count`, both >= 0."""

    constant_ms: float
    slope_ms: float

    def at(self, count: float) -> float:
        """Milliseconds of a pass over `count` units."""
        return self.constant_ms + self.slope_ms * count


@dataclass(frozen=True)
class Coefficients:
    """A line for each stage. The defaults are guesses for two CPU cores, gone after some 50 measurements."""

    stem: Line = Line(5.0, 60.0)
    encode: Line = Line(5.0, 0.2)
    step: Line = Line(5.0, 0.5)

    def of(self, stage: Stage) -> Line:
        """The stage's line."""
        line: Line = getattr(self, stage)
        return line


@dataclass(frozen=True)
class WorkSize:
    """What one request asks of the device."""

    picture: bool
    """Whether its picture has yet to pass the stem."""
    source_tokens: int
    """Encoder tokens, those of the picture included."""
    beams: int
    expected_steps: float


class CostModel:
    """Estimates before, learns after."""

    def __init__(self, coefficients: Coefficients | None = None) -> None:
        self._coefficients = coefficients or Coefficients()
        self._fits = {stage: _Fit.around(self._coefficients.of(stage)) for stage in STAGES}
        self._errors: dict[Stage, float] = {}
        self._steps: dict[str, float] = {}
        self._turn_ms: float | None = None

    @property
    def coefficients(self) -> Coefficients:
        """The present lines."""
        return self._coefficients

    @property
    def error_ratios(self) -> Mapping[Stage, float]:
        """Mean |predicted - measured| / measured of each stage measured so far, the latest counting most."""
        return dict(self._errors)

    def predict(self, stage: Stage, count: float) -> float:
        """Milliseconds of one pass of a stage."""
        return self._coefficients.of(stage).at(count)

    def estimate(self, size: WorkSize, shared_by: float = 1.0) -> float:
        """Milliseconds of one request in passes that it shares with others, `shared_by` requests in all.

        Constants are paid once a pass, so each request carries its part of them; the estimates of a batch add up to
        the batch. Always > 0.
        """

        def part(stage: Stage, count: float) -> float:
            line = self._coefficients.of(stage)
            return line.constant_ms / shared_by + line.slope_ms * count

        stem_ms = part("stem", 1) if size.picture else 0.0
        steps_ms = size.expected_steps * part("step", size.beams)
        return max(stem_ms + part("encode", size.source_tokens) + steps_ms, 1e-3)

    def observe(self, stage: Stage, count: float, measured_ms: float) -> None:
        """Learn from one pass of a stage over `count` (> 0) units. Raises ValueError for what no clock can measure."""
        if not (math.isfinite(measured_ms) and measured_ms >= 0.0 and count > 0):
            raise ValueError(f"a pass of {stage} over {count} units cannot take {measured_ms} ms")
        measured_ms = max(measured_ms, 1e-3)
        line = self._coefficients.of(stage)
        predicted_ms = line.at(count)
        error = abs(predicted_ms - measured_ms) / measured_ms
        self._errors[stage] = _blend(self._errors.get(stage), error, ERROR_MEMORY)
        fit = self._fits[stage]
        fit.add(count, min(measured_ms, MAX_SURPRISE * max(predicted_ms, 1e-3)))
        self._coefficients = replace(self._coefficients, **{stage: fit.line(line)})

    def observe_turn(self, measured_ms: float) -> None:
        """A turn of the engine, in which every running request took a step and others joined, took so long."""
        self._turn_ms = _blend(self._turn_ms, measured_ms, TURN_MEMORY)

    def time_in_batch_ms(self, size: WorkSize) -> float:
        """From a request's start to its answer, if turns go on taking as long as of late: 0 until one was seen.

        Unlike `estimate`, which is the request's own part of the device, this is what its caller waits for.
        """
        if self._turn_ms is None:
            return 0.0
        return self.estimate(replace(size, expected_steps=0.0)) + size.expected_steps * self._turn_ms

    def learn_steps(self, task: str, steps: int) -> None:
        """An answer of this task took so many decoding steps."""
        self._steps[task] = _blend(self._steps.get(task), steps, STEPS_MEMORY)

    def expected_steps(self, task: str, most: int) -> float:
        """Steps that this task's answers take, `most` being the longest allowed; that until one was seen."""
        return min(self._steps.get(task, float(most)), float(most))


@dataclass
class _Fit:
    """Sums of a least-squares line through measurements whose weights decay: weight, x, y, x*x, x*y."""

    sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    @classmethod
    def around(cls, line: Line) -> _Fit:
        """Begin as if the line had been measured at 1 and at 16 units."""
        fit = cls()
        for count in (1.0, 16.0):
            fit.add(count, line.at(count))
        return fit

    def add(self, count: float, measured_ms: float) -> None:
        terms = (1.0, count, measured_ms, count * count, count * measured_ms)
        self.sums = [MEMORY * total + term for total, term in zip(self.sums, terms, strict=True)]

    def line(self, before: Line) -> Line:
        """The best line without a negative part; where the counts hardly vary, `before` scaled to their mean."""
        weight, x, y, xx, xy = self.sums
        mean_x, mean_y = x / weight, y / weight
        variance = xx / weight - mean_x * mean_x
        if variance < MIN_SPREAD * mean_x * mean_x:
            scale = mean_y / max(before.at(mean_x), 1e-9)
            return Line(scale * before.constant_ms, scale * before.slope_ms)
        slope = (xy / weight - mean_x * mean_y) / variance
        constant = mean_y - slope * mean_x
        if slope < 0.0:
            return Line(mean_y, 0.0)
        if constant < 0.0:
            return Line(0.0, xy / xx)
        return Line(constant, slope)


def _blend(old: float | None, new: float, memory: float) -> float:
    return new if old is None else memory * old + (1.0 - memory) * new
