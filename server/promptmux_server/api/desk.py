"""What the routes that take questions share: the limits of a call, and the two forms of a reply."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from promptmux_server.api.answering import Answerer
from promptmux_server.api.call import Call, CallItem
from promptmux_server.api.errors import request_id_of
from promptmux_server.api.leaving import unless_client_leaves
from promptmux_server.api.rendering import answers_response
from promptmux_server.api.schemas import CallOptions
from promptmux_server.api.streaming import AnswerStream
from promptmux_server.errors import InvalidParameter
from promptmux_server.settings import Settings


class Desk:
    """Takes a call in and hands its answers out."""

    def __init__(self, answerer: Answerer, settings: Settings) -> None:
        self._answerer, self._settings = answerer, settings

    def check(self, options: CallOptions, count: int, param: str) -> None:
        """Raise InvalidParameter for more items, or a later deadline, than the settings allow."""
        if count > self._settings.max_items:
            raise InvalidParameter(f"At most {self._settings.max_items} {param} fit in one call.", param=param)
        if options.deadline_ms is not None and options.deadline_ms > self._settings.max_deadline_ms:
            raise InvalidParameter(f"deadline_ms is at most {self._settings.max_deadline_ms}.", param="deadline_ms")

    async def reply(self, request: Request, options: CallOptions, items: Iterable[CallItem]) -> Response:
        """Answer the items, whole or as a stream; if the client leaves, everything is cancelled."""
        deadline_ms = options.deadline_ms or self._settings.default_deadline_ms
        call = Call(
            request_id=request_id_of(request.scope),
            items=tuple(items),
            deadline=time.monotonic() + deadline_ms / 1000.0,
            key=request.scope.get("promptmux.key", ""),
            priority=options.priority,
        )
        if options.stream:
            return AnswerStream(self._answerer, call, self._settings.max_stream_pieces)
        place = self._answerer.admit(call)
        try:
            outcomes = await unless_client_leaves(request.receive, partial(self._answerer.answer_all, call))
        finally:
            place.leave()
        return answers_response(call, outcomes)
