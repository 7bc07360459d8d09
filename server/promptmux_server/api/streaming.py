"""A call answered as server-sent events: `delta` as texts grow, `answer` as items end, `done` at the end.

Owns when a stream begins, how much of it may wait for a slow reader, and how it ends. Until the engine has taken an
item an error is an ordinary JSON answer with its status; afterwards it is the `answer` of its item. A stream that ends
without `done` is not complete: its reader was too slow, or the server went down.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import anyio
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from promptmux_server.api.admission import Place
from promptmux_server.api.answering import Answerer
from promptmux_server.api.call import Call, Outcome
from promptmux_server.api.errors import error_response
from promptmux_server.api.leaving import unless_client_leaves
from promptmux_server.api.rendering import common_failure, dump, entry
from promptmux_server.errors import ClientLeft

KEEP_ALIVE_S = 15.0
"""Silence after which a comment is sent: proxies close what is silent for 30 or 60 seconds."""
STALL_S = 30.0
"""How long one write may wait for a reader that takes nothing."""

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)

log = structlog.get_logger(__name__)


class AnswerStream(Response):
    """Does its work when it is sent: admission, answers and events stand and fall with the connection."""

    def __init__(self, answerer: Answerer, call: Call, max_pieces: int) -> None:
        super().__init__()
        self._answerer, self._call = answerer, call
        self._events = EventBuffer(call, max_pieces)
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        place = self._answerer.admit(self._call)
        try:
            await unless_client_leaves(receive, partial(self._serve, place, scope, receive, send))
        except ClientLeft:
            if not self._started:
                raise
        finally:
            place.leave()

    async def _serve(self, place: Place, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:

            async def answer() -> None:
                outcomes = await self._answerer.answer_all(self._call, self._events)
                place.leave()  # what is still to be written takes nobody's place
                self._events.end(outcomes)

            async def write() -> None:
                refusal = await self._events.begun()
                if refusal is not None:
                    await refusal(scope, receive, send)
                else:
                    await self._write(send)
                group.cancel_scope.cancel()

            group.start_soon(answer)
            group.start_soon(write)
            await self._events.overflowed.wait()
            group.cancel_scope.cancel()
        if self._events.overflowed.is_set():
            log.warning("stream dropped: its reader is too slow", request_id=self._call.request_id)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
        self._started = True
        async for chunk in self._events.chunks():
            with anyio.move_on_after(STALL_S) as patience:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if patience.cancelled_caught:
                self._events.overflowed.set()
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class EventBuffer:
    """Events on their way to a reader; a `Listener`. Pieces of text that wait are counted: one too many ends it all.

    Answers are not counted: a call has as many as it has items.
    """

    def __init__(self, call: Call, max_pieces: int) -> None:
        self._call, self._max_pieces = call, max_pieces
        self._waiting: list[bytes] = []
        self._pieces = 0
        self._ended: set[int] = set()
        self._refusal: Response | None = None
        self._begun, self._changed, self._complete = anyio.Event(), anyio.Event(), False
        self.overflowed = anyio.Event()

    def admitted(self) -> None:
        self._begun.set()

    def text(self, index: int, piece: str) -> None:
        if index in self._ended or self.overflowed.is_set():
            return  # a last word after its deadline, or for nobody
        if self._pieces >= self._max_pieces:
            self.overflowed.set()
            return
        self._pieces += 1
        self._put("delta", {"id": self._call.items[index].id, "text": piece})

    def answered(self, index: int, outcome: Outcome) -> None:
        self._ended.add(index)
        self._put("answer", entry(self._call.items[index], outcome, self._call.request_id))

    def end(self, outcomes: list[Outcome]) -> None:
        """All items have ended; if none was taken by the engine, there is no stream but the first item's error."""
        error = common_failure(outcomes)
        if error is not None and not self._begun.is_set():
            self._refusal = error_response(error, self._call.request_id)
        self._complete = True
        self._put("done", {"request_id": self._call.request_id})
        self._begun.set()

    async def begun(self) -> Response | None:
        """Wait for the stream's beginning, or for the error response that takes its place."""
        await self._begun.wait()
        return self._refusal

    async def chunks(self) -> AsyncIterator[bytes]:
        """Everything that waits, as often as something does, and a comment when nothing does for long."""
        while True:
            with anyio.move_on_after(KEEP_ALIVE_S):
                await self._changed.wait()
            waiting, self._waiting = self._waiting, []
            complete = self._complete
            self._pieces, self._changed = 0, anyio.Event()
            yield b"".join(waiting) or b": keep-alive\n\n"
            if complete:
                return

    def _put(self, event: str, data: dict[str, object]) -> None:
        self._waiting.append(f"event: {event}\ndata: {dump(data)}\n\n".encode())
        self._changed.set()
