"""What a training tells, as server-sent events while it is told.

The table is asked again and again, so a reader costs no memory: one that is slow is sent the next events when it has
taken the last, and one that is gone is forgotten. A stream that ends without the training's end (the server goes, or
its reader stood still) is taken up again behind `Last-Event-ID`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import anyio
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from promptmux_server.api.leaving import unless_client_leaves
from promptmux_server.api.streaming import HEADERS, KEEP_ALIVE_S, STALL_S
from promptmux_server.api.training_documents import event_lines
from promptmux_server.errors import ClientLeft, InvalidParameter, PromptmuxError
from promptmux_server.jobs import Job, JobEvent
from promptmux_server.jobs.trainings import TrainingRequest

POLL_S = 0.5
PAGE = 200
"""Events that are read and sent at a time."""

_NUMBER = re.compile(r"[0-9]{1,9}")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Told:
    """Events behind a number, and whether there is nothing behind them."""

    events: Sequence[JobEvent]
    complete: bool


class Source(Protocol):
    """Where events come from."""

    @property
    def draining(self) -> bool: ...

    def watching(self) -> AbstractContextManager[None]: ...

    async def told(self, job_id: str, after: int) -> Told: ...


class EventStream(Response):
    """Begins with what was read already."""

    def __init__(self, source: Source, job: Job, first: Told, after: int) -> None:
        super().__init__()
        self._source, self._job_id, self._told, self._after = source, job.id, first, after
        self._folder = TrainingRequest.of(job.payload).folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._source.watching(), suppress(ClientLeft):
            await unless_client_leaves(receive, partial(self._write, send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
        silent_since = time.monotonic()
        while True:
            body = b"".join(event_lines(event, self._folder) for event in self._told.events)
            if not body and time.monotonic() - silent_since >= KEEP_ALIVE_S:
                body = b": keep-alive\n\n"
            if body:
                with anyio.move_on_after(STALL_S) as patience:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                if patience.cancelled_caught:
                    return
                silent_since = time.monotonic()
            if self._told.complete or self._source.draining:
                break
            try:
                await self._go_on()
            except PromptmuxError as error:  # the table's: what was sent stands, and the rest can be asked for
                log.warning("events broken off", code=error.code)
                break
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _go_on(self) -> None:
        if self._told.events:
            self._after = self._told.events[-1].number
        if len(self._told.events) < PAGE:
            await anyio.sleep(POLL_S)
        self._told = await self._source.told(self._job_id, self._after)


def last_event(request: Request) -> int:
    """Number of the event behind which a stream is taken up; 0 for one from the beginning."""
    given = request.headers.get("last-event-id", "0")
    if not _NUMBER.fullmatch(given):
        raise InvalidParameter("Last-Event-ID is the number of an event.", param="Last-Event-ID")
    return int(given)
