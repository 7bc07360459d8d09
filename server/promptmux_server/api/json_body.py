"""Strict JSON in: bytes of a request body to plain Python values, or `MalformedJson`.

Owns what counts as JSON here. RFC 8259, and besides: UTF-8 only, unique keys, no NaN or Infinity (written or by
overflow), no lone surrogates, bounded nesting, keys, number length and structure. Knows nothing of schemas.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from promptmux_server.errors import MalformedJson

MAX_DEPTH = 32
MAX_KEYS = 256
MAX_NUMBER_CHARS = 32
MAX_STRUCTURE = 600_000
"""Most `[`, `{` and `,` in one body. A full call of 64 items with two texts of 4,096 commas stays below it; a body
of 16 MiB of empty lists, which would take hundreds of MiB as objects, does not."""


def decode_json(body: bytes) -> Any:
    """Parse one body. Raises MalformedJson with a message that repeats nothing of the body."""
    if body.count(b"[") + body.count(b"{") + body.count(b",") > MAX_STRUCTURE:
        raise MalformedJson("The JSON body has too many elements.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedJson("The body is not valid UTF-8.") from error
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant
        )
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise MalformedJson("The body is not valid JSON.") from error
    _check_depth(value)
    if "\\u" in text:
        _check_surrogates(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise MalformedJson(f"A JSON object has more than {MAX_KEYS} keys.")
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise MalformedJson("A JSON object has a key twice.")
    return keys


def _integer(digits: str) -> int:
    _check_number(digits)
    return int(digits)


def _number(digits: str) -> float:
    _check_number(digits)
    value = float(digits)
    if not math.isfinite(value):
        raise MalformedJson("A JSON number is out of range.")
    return value


def _check_number(digits: str) -> None:
    if len(digits) > MAX_NUMBER_CHARS:
        raise MalformedJson(f"A JSON number has more than {MAX_NUMBER_CHARS} characters.")


def _constant(_: str) -> NoReturn:
    raise MalformedJson("NaN and Infinity are not JSON.")


def _too_deep() -> MalformedJson:
    return MalformedJson(f"The JSON body is nested more than {MAX_DEPTH} levels deep.")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]


def _check_surrogates(value: Any) -> None:
    """Half of a surrogate pair is a string that no encoder can write back."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                raise MalformedJson("A JSON string holds half of a surrogate pair.") from error
