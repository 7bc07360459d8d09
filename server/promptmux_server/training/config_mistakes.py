"""What is said about mistakes in a configuration's text: the field, its line, what is wrong, and what might be meant.

For TOML and JSON, and any model of sections. Knows nothing of what the fields mean.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.data.source import SourceConfig

MOST_TOLD, MOST_DETAILED = 20, 5
"""Mistakes that are told of at once, in words and for programs."""
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")

Conflict = tuple[Sequence[str], str]
"""Where something stands that is well-formed and still wrong, and why it is."""


def check_none(conflicts: Iterable[Conflict], text: str, name: str) -> None:
    """Raise TrainingConfigError for conflicts, if there are any."""
    if told := [_told(text, place, reason) for place, reason in conflicts]:
        raise _refusal(told, name, told[0]["field"])


def refuse(error: ValidationError, model: type[BaseModel], text: str, name: str) -> NoReturn:
    """Raise TrainingConfigError for what pydantic found: many mistakes at once, each with its line."""
    first = error.errors()[0]
    known = first["loc"][:-1] if first["type"] in UNKNOWN else first["loc"]
    told = [_mistake(mistake, model, text) for mistake in error.errors()[:MOST_TOLD]]
    raise _refusal(told, name, ".".join(map(str, known)) or None) from error


def no_such_field(field: str, known: Sequence[str]) -> str:
    """What is said of a name that stands where it may not."""
    near = difflib.get_close_matches(field, known, 1)
    meant = f"; did you mean `{near[0]}`?" if near else ""
    return f"there is no such field here{meant} Allowed are {', '.join(known)}"


def _refusal(told: Sequence[Mapping[str, Any]], name: str, param: str | None) -> TrainingConfigError:
    said = []
    for each in told:
        where = f"{name}, line {each['line']}" if each["line"] else name
        said.append(f"{where}: {each['field']}: {each['reason']}")
    return TrainingConfigError("\n".join(said), param=param, details={"mistakes": told[:MOST_DETAILED]})


def _mistake(mistake: Mapping[str, Any], model: type[BaseModel], text: str) -> dict[str, Any]:
    """A field, its line and what is wrong with it."""
    place = [str(part) for part in mistake["loc"] if not isinstance(part, int)]
    match mistake["type"]:
        case kind if kind in UNKNOWN:
            reason = no_such_field(place[-1], _fields_of(model, place[:-1]))
        case "missing":
            reason = "is missing"
        case "value_error":
            reason = str(mistake["ctx"]["error"])
        case _:
            reason = mistake["msg"][:1].lower() + mistake["msg"][1:]
    return _told(text, place, reason)


def _told(text: str, place: Sequence[str], reason: str) -> dict[str, Any]:
    return {"field": ".".join(place), "line": _line_of(text, place), "reason": f"{reason}."}


def _fields_of(model: type[BaseModel], place: Sequence[str]) -> list[str]:
    """Names that may stand in a section."""
    if not place:
        return list(model.model_fields)
    owner = SourceConfig if len(place) > 1 else model.model_fields[place[0]].annotation
    assert is_dataclass(owner)
    return [each.name for each in fields(owner)]


def _line_of(text: str, place: Sequence[str]) -> int | None:
    """The line (from 1) where a field stands, or else its section begins; None if neither is written out plainly."""
    section: list[str] = []
    nearest = None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([\w.-]+)\s*\]", line):
            section = header[1].split(".")
            if section == place[: len(section)]:
                nearest = number
        elif (key := re.match(r"\s*([\w.-]+)\s*=", line)) and [*section, *key[1].split(".")] == list(place):
            return number
    return nearest
