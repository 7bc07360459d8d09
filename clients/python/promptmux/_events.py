"""Server-sent events read line by line: pieces and answers out, and whether the stream came to its end.

Owns the framing. Knows no connection: the clients feed it.
"""

from __future__ import annotations

import json

from pydantic import ValidationError

from promptmux._errors import ConnectionFailed, ServerError
from promptmux._models import Answer, Delta


class EventReader:
    """Feed it each line of a stream, then `close` it."""

    def __init__(self) -> None:
        self._event = ""
        self._data = ""
        self._done = False

    def read(self, line: str) -> Delta | Answer | None:
        """The event that this line completes, if it is one for the caller; raises ServerError for what is not ours."""
        field, _, value = line.partition(":")
        if field == "event":
            self._event = value.strip()
        elif field == "data":
            self._data += value
        elif not line:
            return self._complete()
        return None

    def _complete(self) -> Delta | Answer | None:
        event, data = self._event, self._data
        self._event = self._data = ""
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
