"""JSON that means one thing: no duplicate keys, NaN, Infinity or half characters, and one canonical way to write it."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from promptmux_prompts.errors import InvalidPromptFile

MAX_DEPTH = 32


def parse(text: str | bytes, what: str) -> Any:
    """Parse strictly; raises InvalidPromptFile naming `what`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
        _check_depth(value)
        if not text.isascii() or ("\\u" if isinstance(text, str) else b"\\u") in text:  # type: ignore[operator]
            # Fails for half of a surrogate pair, which no encoder can write.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidPromptFile(f"the {what} is not strict JSON") from error
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]


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
