"""What every request passes before a route sees it: id, header size, who asks, body size, one log line.

Pure ASGI: a wrapping middleware would hide a client's departure from the routes. Order matters: nothing of a body is
read before the key is checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
import uuid
from collections.abc import Iterable

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from promptmux_server.api.access import Access
from promptmux_server.api.errors import as_promptmux_error, error_response
from promptmux_server.api.metrics import Metrics, route_of
from promptmux_server.errors import BadRequest, BodyTooLarge, ClientLeft, Draining, HeaderTooLarge
from promptmux_server.settings import Settings

WORTH_READING = 64 * 1024
"""Bytes of an unwanted body that are read and dropped to keep its connection open."""

LAST_WORD_S = 1.0
"""How long a request that the server's end cancels may wait for its client to take the answer that says so."""

MAX_LENGTH_DIGITS = 19
"""Digits of a Content-Length that is meant seriously."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = structlog.get_logger(__name__)

Headers = Iterable[tuple[bytes, bytes]]


class Edge:
    """Wraps the application; see the module's header."""

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, access: Access, max_prompt_bytes: int
    ) -> None:
        self._app, self._settings, self._metrics, self._access = app, settings, metrics, access
        self._max_prompt_bytes = max_prompt_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _refuse(scope, send)
            return
        started = time.monotonic()
        request_id = _request_id(scope["headers"])
        scope["promptmux.request_id"] = request_id
        status = 499  # unless an answer is begun: then the client has left
        counted = _CappedBody(scope["headers"], receive)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if counted.is_long:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            counted.limit = self._check(scope)
            await self._app(scope, counted, answer)
        except Exception as error:  # ours from the checks above; others have been answered and come by to be seen
            if status == 499 and not isinstance(error, ClientLeft):
                await error_response(as_promptmux_error(error), request_id)(scope, receive, answer)
        except asyncio.CancelledError:  # only the server's own end cancels a request: its drain timeout has passed
            if status == 499:
                late = Draining("The server shut down before this request was complete.", retry_after_s=5)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_WORD_S):
                        await error_response(late, request_id)(scope, receive, answer)
        finally:
            seconds = time.monotonic() - started
            self._metrics.http(scope, status, seconds)
            log.info(
                "request",
                request_id=request_id,
                method=scope["method"],
                route=route_of(scope),
                status=status,
                ms=round(1000 * seconds, 1),
            )

    def _check(self, scope: Scope) -> int:
        """Bytes that the body may have; raises what refuses the request before any of them is read."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(k) + len(v) + 4 for k, v in headers)
        if size > self._settings.max_header_bytes:
            raise HeaderTooLarge(f"Request line and headers exceed {self._settings.max_header_bytes} bytes.")
        rule, scope["promptmux.key"] = self._access.check(scope)
        limit = self._max_prompt_bytes if rule.takes_prompt else self._settings.max_body_bytes
        if limit < _declared_size(headers) < math.inf:
            raise BodyTooLarge(f"The body exceeds {limit} bytes.")
        if any(name == b"content-encoding" and value.lower() not in (b"", b"identity") for name, value in headers):
            raise BadRequest("Compressed bodies are not accepted.")
        return limit


class _CappedBody:
    """Counts the bytes of a body as they come in; raises BodyTooLarge at the first too many."""

    limit = 0
    """Set once the request has been let in; until then nothing is read."""

    def __init__(self, headers: Headers, receive: Receive) -> None:
        self._receive, self._read = receive, 0
        self._unread = _declared_size(headers)

    @property
    def is_long(self) -> bool:
        """Whether so much of the body is unread that closing the connection is cheaper than reading on."""
        return self._unread > WORTH_READING

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._read += size
            self._unread = self._unread - size if message.get("more_body") else 0
            if self._read > self.limit:
                raise BodyTooLarge("The body is larger than this server accepts.")
        return message


def _declared_size(headers: Headers) -> float:
    """Bytes of the body as the headers say it; infinite for a chunked one, 0 for none."""
    sizes = dict(headers)
    if b"transfer-encoding" in sizes:
        return math.inf
    length = sizes.get(b"content-length", b"0")
    return int(length) if length.isdigit() and len(length) <= MAX_LENGTH_DIGITS else math.inf


async def _refuse(scope: Scope, send: Send) -> None:
    """No route here speaks WebSocket, and one that passed this wrapper would pass unauthenticated."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1003})


def _request_id(headers: Headers) -> str:
    """The caller's X-Request-Id if it is harmless, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(text := value.decode("latin-1")):
            return text
    return uuid.uuid4().hex
