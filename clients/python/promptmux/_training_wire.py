"""Calls about trainings, and how their answers are read: what both clients share. Nothing here sends anything."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
from pydantic import ValidationError

from promptmux._errors import ServerError
from promptmux._events import Frames
from promptmux._training_models import LAST_EVENTS, Training, TrainingEvent, TrainingStatus
from promptmux._wire import Call, not_understood, read_object, read_page

Config = str | Path | Mapping[str, Any]
"""A configuration: its TOML text, the path of its file, or the same as a mapping."""

ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def submit_call(config: Config, *, priority: int, metadata: Mapping[str, str] | None, key: str | None) -> Call:
    """With a key of its own unless one is given, so that it may be sent again after its answer was lost."""
    sent = config.read_text(encoding="utf-8") if isinstance(config, Path) else config
    body = {
        "config": sent if isinstance(sent, str) else dict(sent),
        "priority": priority,
        "metadata": dict(metadata or {}),
    }
    return Call("POST", "/v1/trainings", body, headers={"Idempotency-Key": key or uuid.uuid4().hex})


def list_call(status: TrainingStatus | None, after: str | None) -> Call:
    params = {"status": status, "after": after}
    return Call("GET", "/v1/trainings", params={name: value for name, value in params.items() if value is not None})


def get_call(training_id: str) -> Call:
    return Call("GET", _path(training_id))


def cancel_call(training_id: str) -> Call:
    return Call("DELETE", _path(training_id))


def events_call(training_id: str, after: int) -> Call:
    headers = {"Accept": "text/event-stream", **({"Last-Event-ID": str(after)} if after else {})}
    return Call("GET", _path(training_id) + "/events", headers=headers)


def read_training(response: httpx2.Response) -> Training:
    raw = read_object(response)
    try:
        return Training.model_validate(raw)
    except ValidationError as error:
        raise not_understood(response) from error


def read_trainings(response: httpx2.Response) -> tuple[list[Training], str | None]:
    """One page, and the id after which the next one begins; None = there is no other."""
    return read_page(response, "trainings", Training)


class TrainingEvents:
    """A training's events out of the lines of one stream after the other, and where the next one has to begin."""

    def __init__(self, after: int) -> None:
        self.after, self.complete = after, False
        self._frames = Frames()

    def opened(self, response: httpx2.Response) -> None:
        """A new stream; one without content says that nothing follows."""
        self._frames = Frames()
        self.complete = response.status_code == 204

    def read(self, line: str) -> TrainingEvent | None:
        """The event that this line completes; raises ServerError for what is not ours."""
        frame = self._frames.read(line)
        if frame is None:
            return None
        try:
            event = TrainingEvent.model_validate_json(frame[1])
        except ValidationError as error:
            raise ServerError("The server's event is not understood.", status=200) from error
        self.after, self.complete = event.number, event.name in LAST_EVENTS
        return event


def _path(training_id: str) -> str:
    """Raises ValueError for what cannot be an id, and in a path might mean something else."""
    if not ID.fullmatch(training_id):
        raise ValueError("a training's id is 1 to 64 letters, digits, '_' and '-'")
    return f"/v1/trainings/{training_id}"
