"""Answers the items of a call: submit, wait, and let go of whatever nobody waits for any more.

Owns the way to the engine and back. Knows no body and no response: who listens is told through `Listener`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

import anyio
import structlog

from promptmux_server.api.admission import Admission, Place
from promptmux_server.api.call import Call, CallItem, Outcome
from promptmux_server.api.errors import as_promptmux_error
from promptmux_server.api.metrics import Metrics
from promptmux_server.backbone.images import ImageLimits
from promptmux_server.engine.request import Answer, EnginePort, Request
from promptmux_server.errors import DeadlineExceeded, NonfiniteOutput
from promptmux_server.settings import Settings

log = structlog.get_logger(__name__)


class Listener(Protocol):
    """Hears of a call's progress, on the event loop."""

    def admitted(self) -> None:
        """The engine has taken an item."""

    def text(self, index: int, piece: str) -> None:
        """An item's text has grown."""

    def answered(self, index: int, outcome: Outcome) -> None:
        """An item has ended."""


class Answerer:
    """Between the routes and the engine; one for the whole server, since it counts what is admitted."""

    def __init__(self, engine: EnginePort, settings: Settings, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels, settings.max_image_side)
        self._workers = anyio.CapacityLimiter(settings.concurrent_decodes)
        self._admission = Admission(settings.queue_size, settings.queue_per_key)

    def admit(self, call: Call) -> Place:
        """Count a call's items in; raises TenantQueueFull or Overloaded. To be left when they have ended."""
        return self._admission.enter(call.key, len(call.items))

    async def answer_all(self, call: Call, listener: Listener | None = None) -> list[Outcome]:
        """Every item's outcome, in their order. If this is cancelled, so is everything in the engine."""
        outcomes: dict[int, Outcome] = {}

        async def answer_one(index: int) -> None:
            outcomes[index] = await self._answer(call, index, listener)
            if (picture := call.items[index].picture) is not None:
                picture.let_go()
            if listener is not None:
                listener.answered(index, outcomes[index])

        async with anyio.create_task_group() as group:
            for index in range(len(call.items)):
                group.start_soon(answer_one, index)
        return [outcomes[index] for index in range(len(call.items))]

    async def _answer(self, call: Call, index: int, listener: Listener | None) -> Outcome:
        task = call.items[index].task
        try:
            answer = await self._awaited(call, index, listener)
        except asyncio.CancelledError:
            self._metrics.item(task, "cancelled", {})
            raise
        except Exception as error:
            known = as_promptmux_error(error)
            if known is not error:
                log.error("item failed", request_id=call.request_id, exc_info=error)
            self._metrics.item(task, known.code, {})
            return known
        self._metrics.item(task, "ok", answer.timings_ms)
        return answer

    async def _awaited(self, call: Call, index: int, listener: Listener | None) -> Answer:
        """Submit and wait, until the deadline at most. However this ends, no work is left behind in the engine."""
        future: Future[Answer] | None = None
        try:
            with anyio.fail_after(max(0.0, call.deadline - time.monotonic())):
                request = await self._request(call, call.items[index], _pieces(listener, index))
                # anyio lets the thread end before a cancellation is felt: no future is lost, nor a worker's place.
                future = await anyio.to_thread.run_sync(self._engine.submit, request, limiter=self._workers)
                if listener is not None:
                    listener.admitted()
                answer = await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise DeadlineExceeded("The request's deadline passed before its answer was complete.") from error
        finally:
            if future is not None:
                future.cancel()
        if not _is_finite(answer):
            raise NonfiniteOutput("This task's prompt produced numbers that are not finite.")
        return answer

    async def _request(self, call: Call, item: CallItem, on_text: Callable[[str], None] | None) -> Request:
        picture = item.picture
        return Request(
            request_id=call.request_id,
            task=item.task,
            text=item.text,
            premise=item.premise,
            image=None if picture is None else await picture.decoded(self._limits, self._workers),
            decoding=item.decoding,
            deadline=call.deadline,
            key=call.key,
            priority=call.priority,
            on_text=on_text,
        )


def _pieces(listener: Listener | None, index: int) -> Callable[[str], None] | None:
    """What the engine's thread calls: it returns at once, whatever the event loop is doing."""
    if listener is None:
        return None
    loop, hear = asyncio.get_running_loop(), listener.text

    def on_text(piece: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is on its way out
            loop.call_soon_threadsafe(hear, index, piece)

    return on_text


def _is_finite(answer: Answer) -> bool:
    """Whether every number of an answer can be written as JSON."""
    box = getattr(answer.output, "box", ())
    probabilities = getattr(answer.output, "probabilities", {})
    return all(map(math.isfinite, (answer.score, *box, *probabilities.values())))
