"""POST /v1/predict: items of any tasks, in one call and one batch."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from promptmux_server.api.errors import as_promptmux_error, error_object, error_response, request_id_of
from promptmux_server.api.json_body import decode_json
from promptmux_server.api.metrics import Metrics
from promptmux_server.api.schemas import PredictItem, PredictRequest, parse_predict
from promptmux_server.backbone.images import ImageLimits, decode_base64_image
from promptmux_server.engine.request import Answer, EnginePort
from promptmux_server.engine.request import Request as EngineRequest
from promptmux_server.errors import ClientLeft, InvalidParameter, Overloaded, PromptmuxError, UnsupportedMediaType
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
            raise Overloaded("The server's queue is full. Retry after the given time.", retry_after_s=1)
        self._admitted += count
        try:
            outcomes = await _unless_client_leaves(request, self._answer_all(request, call))
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

    async def _answer_all(self, request: Request, call: PredictRequest) -> list[Answer | PromptmuxError]:
        deadline = time.monotonic() + (call.deadline_ms or self._settings.default_deadline_ms) / 1000.0
        request_id = request_id_of(request.scope)
        return await asyncio.gather(*(self._answer(item, request_id, deadline) for item in call.items))

    async def _answer(self, item: PredictItem, request_id: str, deadline: float) -> Answer | PromptmuxError:
        """One item's answer or error; an error of one item is not an error of the call."""
        try:
            future = await anyio.to_thread.run_sync(self._submit, item, request_id, deadline, limiter=self._decoders)
            answer = await asyncio.wrap_future(future)
        except Exception as error:
            known = as_promptmux_error(error)
            if not isinstance(error, PromptmuxError):
                raise
            self._metrics.item(item.task, known.code, {})
            return known
        self._metrics.item(item.task, "ok", answer.timings_ms)
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
                decoding=item.decoding,
                deadline=deadline,
            )
        )


async def _unless_client_leaves(request: Request, work: Any) -> Any:
    """Await `work`; if the client disconnects first, cancel it (and with it the engine's futures)."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft("The client left before the answer was ready.")
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
