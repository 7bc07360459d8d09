"""The nouns between the routes that take questions and what answers them: a call, its items, their outcomes.

Knows no schema and no HTTP: a route has checked everything that can be checked before the engine is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from promptmux_server.api.pictures import Picture
from promptmux_server.engine.request import Answer, Priority
from promptmux_server.errors import PromptmuxError

Outcome = Answer | PromptmuxError
"""What became of one item; an error of one item is not an error of the call."""


@dataclass(frozen=True, kw_only=True)
class CallItem:
    """One question of a task; items of one call may share a picture."""

    id: str
    task: str
    text: str | None = None
    premise: str | None = None
    decoding: Mapping[str, object] | None = None
    picture: Picture | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one HTTP request asks."""

    request_id: str
    items: tuple[CallItem, ...]
    deadline: float
    """`time.monotonic()` seconds."""
    key: str
    """Name of the API key that asks; "" where the server has none."""
    priority: Priority
