"""JSON that means one thing: no duplicate keys, no NaN, no Infinity, and one canonical way to write it."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from promptmux_prompts.errors import InvalidPromptFile


def parse(text: str | bytes, what: str) -> Any:
    """Parse strictly; raises InvalidPromptFile naming `what`."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidPromptFile(f"the {what} is not strict JSON") from error


def canonical(value: object) -> str:
    """Sorted keys, no blanks, ASCII: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("duplicate key")
    return keys


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(text)
    return value
