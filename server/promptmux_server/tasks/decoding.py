"""How an answer is searched for, and what a search found: the plain values that tasks and the engine share.

Owns the parameters, their bounds and how a request overrides them. Knows no model and no search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, Self, get_args

from promptmux_server.errors import InvalidParameter

Method = Literal["greedy", "beam", "sample", "candidates"]

MAX_BEAMS = 8
MAX_NEW_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class DecodingParams:
    """Lengths count generated tokens without eos (fairseq's min_len and max_len; ofa-spec 9.4)."""

    method: Method = "beam"
    beam_size: int = 5
    min_length: int = 1
    max_length: int = 16
    length_penalty: float = 1.0
    normalize: bool = True
    """Divide a hypothesis' score by (length with eos) ** length_penalty."""
    no_repeat_ngram: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    constrained: bool = False
    """Keep to the task's closed answer set at every step."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise _invalid("method", f"must be one of {', '.join(get_args(Method))}")
        _check("beam_size", self.beam_size, 1, MAX_BEAMS)
        _check("max_length", self.max_length, 1, MAX_NEW_TOKENS)
        _check("min_length", self.min_length, 0, self.max_length)
        _check("no_repeat_ngram", self.no_repeat_ngram, 0, MAX_NEW_TOKENS)
        _check("length_penalty", self.length_penalty, -10.0, 10.0)
        _check("temperature", self.temperature, 1e-3, 100.0)
        _check("top_k", self.top_k, 0, 1 << 20)
        _check("top_p", self.top_p, 1e-3, 1.0)
        if self.seed is not None:
            _check("seed", self.seed, 0, (1 << 63) - 1)

    def merged(self, overrides: Mapping[str, object]) -> Self:
        """These parameters with a request's overrides; unknown names and wrong types raise InvalidParameter."""
        known = {field.name: field.type for field in fields(self)}
        for name, value in overrides.items():
            if name not in known:
                raise _invalid(name, f"is unknown; known are {', '.join(known)}")
            if not _fits(str(known[name]), value):
                raise _invalid(name, f"must be of type {str(known[name]).lower()}")
        return replace(self, **overrides)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Hypothesis:
    """One finished text: generated ids with eos, without prefix; `positional_scores` are log-probabilities per id."""

    tokens: tuple[int, ...]
    score: float
    positional_scores: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What a search found: hypotheses best first, and for a scored answer set the log-probability of every answer."""

    hypotheses: tuple[Hypothesis, ...]
    candidate_scores: tuple[float, ...] | None = None


def _fits(type_name: str, value: object) -> bool:
    if type_name.startswith("int"):
        return (isinstance(value, int) and not isinstance(value, bool)) or (value is None and "None" in type_name)
    if type_name == "float":
        # A whole number too large for a float is finite; the bounds refuse it.
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and math.isfinite(value)
        )
    return isinstance(value, bool if type_name == "bool" else str)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise _invalid(name, f"must be between {low:g} and {high:g}")


def _invalid(name: str, reason: str) -> InvalidParameter:
    return InvalidParameter(f"decoding.{name[:64]} {reason}.", param=f"decoding.{name[:64]}")
