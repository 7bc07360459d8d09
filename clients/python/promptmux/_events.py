"""Server-sent events read line by line: frames, and of a call's stream pieces, answers and whether it came to its end.

Owns the framing. Knows no connection: the clients feed it.
"""

from __future__ import annotations

import json

from pydantic import ValidationError

from promptmux._errors import ConnectionFailed, ServerError
from promptmux._models import Answer, Delta


class Frames:
    """Feed it each line of a stream."""

    def __init__(self) -> None:
        self._event = ""
        self._data = ""

    def read(self, line: str) -> tuple[str, str] | None:
        """Name and data of the event that this line completes; comments and empty events are none."""
        field, _, value = line.partition(":")
        if field == "event":
            self._event = value.strip()
        elif field == "data":
            self._data += value
        elif not line and (self._event or self._data):
            event, data = self._event, self._data
            self._event = self._data = ""
            return event, data
        return None


class EventReader:
    """Feed it each line of a call's stream, then `close` it."""

    def __init__(self) -> None:
        self._frames = Frames()
        self._done = False

    def read(self, line: str) -> Delta | Answer | None:
        """The event that this line completes, if it is one for the caller; raises ServerError for what is not ours."""
        frame = self._frames.read(line)
        return None if frame is None else self._complete(*frame)

    def _complete(self, event: str, data: str) -> Delta | Answer | None:
        try:
            if event == "delta":
                return Delta.model_validate(json.loads(data))
            if event == "answer":
                return Answer.model_validate(json.loads(data))
        except (ValueError, ValidationError) as error:
            raise ServerError("The server's event is not understood.", status=200) from error
        self._done = self._done or event == "done"
        return None

    def close(self) -> None:
        """Raise ConnectionFailed unless the stream has said that it is complete."""
        if not self._done:
            raise ConnectionFailed("The stream ended before it was complete.")
