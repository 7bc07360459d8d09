"""POST /v1/predict: items of any tasks, in one call and one batch."""

from __future__ import annotations

import asyncio
import json
import math
import time
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from promptmux_server.api.errors import error_object, error_response, request_id_of
from promptmux_server.api.json_body import decode_json
from promptmux_server.api.metrics import Metrics
from promptmux_server.api.schemas import PredictItem, PredictRequest, parse_predict
from promptmux_server.backbone.images import ImageLimits, decode_base64_image
from promptmux_server.engine.request import Answer, EnginePort
from promptmux_server.engine.request import Request as EngineRequest
from promptmux_server.errors import (
    ClientLeft,
    DeadlineExceeded,
    InvalidParameter,
    NonfiniteOutput,
    Overloaded,
    PromptmuxError,
    UnsupportedMediaType,
)
from promptmux_server.settings import Settings


class Predictor:
    """Admits items, waits for their answers, and lets go of them when the client leaves."""

    def __init__(self, engine: EnginePort, settings: Settings, metrics: Metrics) -> None:
        self._engine, self._settings, self._metrics = engine, settings, metrics
        self._limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels, settings.max_image_side)
        self._decoders = anyio.CapacityLimiter(settings.concurrent_decodes)
        self._admitted = 0

    async def __call__(self, request: Request) -> Response:
        call = await self._read(request)
        count = len(call.items)
        # Counted before anything is decoded: a burst must not cost pictures that are refused afterwards.
        if self._admitted + count > self._settings.queue_size:
            raise Overloaded("The server's queue is full. Retry after the given time.")
        self._admitted += count
        try:
            outcomes = await self._unless_client_leaves(request, call)
        finally:
            self._admitted -= count
        return _response(call, outcomes, request_id_of(request.scope))

    async def _read(self, request: Request) -> PredictRequest:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise UnsupportedMediaType("Send the body as application/json.")
        try:
            body = await request.body()
        except ClientDisconnect as error:
            raise ClientLeft("The client left while sending.") from error
        call = parse_predict(await anyio.to_thread.run_sync(decode_json, body))
        if len(call.items) > self._settings.max_items:
            raise InvalidParameter(f"At most {self._settings.max_items} items fit in one call.", param="items")
        if call.deadline_ms is not None and call.deadline_ms > self._settings.max_deadline_ms:
            raise InvalidParameter(f"deadline_ms is at most {self._settings.max_deadline_ms}.", param="deadline_ms")
        return call

    async def _unless_client_leaves(self, request: Request, call: PredictRequest) -> list[Answer | PromptmuxError]:
        """The outcomes; if the client disconnects first, everything is cancelled and ClientLeft raised."""
        outcomes: list[Answer | PromptmuxError] | None = None
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            outcomes = await self._answer_all(request, call)
            group.cancel_scope.cancel()
        if outcomes is None:
            raise ClientLeft("The client left before the answer was ready.")
        return outcomes

    async def _answer_all(self, request: Request, call: PredictRequest) -> list[Answer | PromptmuxError]:
        deadline = time.monotonic() + (call.deadline_ms or self._settings.default_deadline_ms) / 1000.0
        request_id = request_id_of(request.scope)
        outcomes: dict[int, Answer | PromptmuxError] = {}

        async def answer_one(index: int) -> None:
            outcomes[index] = await self._answer(call.items[index], request_id, deadline)

        async with anyio.create_task_group() as group:
            for index in range(len(call.items)):
                group.start_soon(answer_one, index)
        return [outcomes[index] for index in range(len(call.items))]

    async def _answer(self, item: PredictItem, request_id: str, deadline: float) -> Answer | PromptmuxError:
        """One item's answer or error; an error of one item is not an error of the call."""
        try:
            answer = await self._awaited(item, request_id, deadline)
        except PromptmuxError as error:
            self._metrics.item(item.task, error.code, {})
            return error
        self._metrics.item(item.task, "ok", answer.timings_ms)
        return answer

    async def _awaited(self, item: PredictItem, request_id: str, deadline: float) -> Answer:
        """Submit and wait, until the deadline at most. However this ends, no work is left behind in the engine."""
        future: Future[Answer] | None = None
        try:
            with anyio.fail_after(max(0.0, deadline - time.monotonic())):
                # anyio lets the thread end before a cancellation is felt: no future is lost, nor a decoder's place.
                future = await anyio.to_thread.run_sync(
                    self._submit, item, request_id, deadline, limiter=self._decoders
                )
                answer = await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise DeadlineExceeded("The request's deadline passed before its answer was complete.") from error
        finally:
            if future is not None:
                future.cancel()
        if not _is_finite(answer):
            raise NonfiniteOutput("This task's prompt produced numbers that are not finite.")
        return answer

    def _submit(self, item: PredictItem, request_id: str, deadline: float) -> Future[Answer]:
        """Decode the picture and queue the item; runs off the event loop."""
        image = None if item.image is None else decode_base64_image(item.image, self._limits)
        return self._engine.submit(
            EngineRequest(
                request_id=request_id,
                task=item.task,
                text=item.text,
                premise=item.premise,
                image=image,
                decoding=None if item.decoding is None else item.decoding.model_dump(exclude_none=True),
                deadline=deadline,
            )
        )


def _is_finite(answer: Answer) -> bool:
    """Whether every number of an answer can be written as JSON."""
    box = getattr(answer.output, "box", ())
    probabilities = getattr(answer.output, "probabilities", {})
    return all(map(math.isfinite, (answer.score, *box, *probabilities.values())))


def _response(call: PredictRequest, outcomes: list[Answer | PromptmuxError], request_id: str) -> Response:
    errors = [outcome for outcome in outcomes if isinstance(outcome, PromptmuxError)]
    if len(errors) == len(outcomes):
        return error_response(errors[0], request_id)
    answers = [
        {"id": item.id if item.id is not None else str(index), "task": item.task, **_rendered(outcome, request_id)}
        for index, (item, outcome) in enumerate(zip(call.items, outcomes, strict=True))
    ]
    body = json.dumps({"request_id": request_id, "answers": answers}, allow_nan=False)
    return Response(body, media_type=JSONResponse.media_type)


def _rendered(outcome: Answer | PromptmuxError, request_id: str) -> dict[str, Any]:
    if isinstance(outcome, PromptmuxError):
        return {"error": error_object(outcome, request_id)}
    return {
        "output": asdict(outcome.output),  # type: ignore[call-overload]
        "score": outcome.score,
        "prompt": asdict(outcome.prompt),
        "timings_ms": dict(outcome.timings_ms),
    }
