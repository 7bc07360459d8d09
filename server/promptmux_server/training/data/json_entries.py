"""A large JSON document, entry by entry: lists at its top are walked, so that no more than one entry is an object.

Knows where an entry stands, and not what it means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promptmux_server.errors import DataError

_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def entries(path: Path) -> Iterator[tuple[str, int, Any]]:
    """(key, number from 0, entry) of all lists at the top of an object; (key, 0, value) of what is no list.

    Raises DataError with the line where the document breaks off.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read as UTF-8 text: check its name and its permissions.") from error
    walk = _Walk(text)
    try:
        yield from _members(walk)
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, getattr(error, "pos", walk.position)) + 1
        raise DataError(f"{path.name}, line {line}: not JSON with one object at its top. Is the file whole?") from error


class _Walk:
    """A place in a text."""

    def __init__(self, text: str) -> None:
        self._text, self.position = text, 0
        self.skip_blanks()

    def skip_blanks(self) -> None:
        found = _BLANKS.match(self._text, self.position)
        self.position = found.end() if found else self.position

    def sees(self, symbol: str) -> bool:
        """Whether the symbol comes next; it is passed if so."""
        if not self._text.startswith(symbol, self.position):
            return False
        self.position += 1
        self.skip_blanks()
        return True

    def need(self, symbol: str) -> None:
        if not self.sees(symbol):
            raise ValueError(symbol)

    def value(self) -> Any:
        found, self.position = _DECODER.raw_decode(self._text, self.position)
        self.skip_blanks()
        return found

    def need_end(self) -> None:
        if self.position != len(self._text):
            raise ValueError("more behind the end")


def _members(walk: _Walk) -> Iterator[tuple[str, int, Any]]:
    walk.need("{")
    while not walk.sees("}"):
        key = walk.value()
        walk.need(":")
        if walk.sees("["):
            for number, value in enumerate(_elements(walk)):
                yield key, number, value
        else:
            yield key, 0, walk.value()
        if not walk.sees(","):
            walk.need("}")
            break
    walk.need_end()


def _elements(walk: _Walk) -> Iterator[Any]:
    while not walk.sees("]"):
        yield walk.value()
        if not walk.sees(","):
            walk.need("]")
            break
