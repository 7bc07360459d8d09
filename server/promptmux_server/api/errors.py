"""The one place that turns an exception into an HTTP answer.

The body is an RFC 9457 problem and OpenAI's error object at once, so that either kind of client understands it. It
never repeats what was sent and never names a path.
"""

from __future__ import annotations

import http
import json
import math
import random
from collections.abc import Mapping
from typing import Any

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from promptmux_prompts import PromptFileError, StoreError
from promptmux_server.api.access import allowed_methods
from promptmux_server.errors import (
    BadRequest,
    Internal,
    InvalidParameter,
    MethodNotAllowed,
    PromptmuxError,
    PromptNotFound,
    PromptQuarantined,
    PromptRefused,
    RegistryFull,
    RouteNotFound,
    StorageFailed,
    StorageFull,
    VersionMismatch,
    VersionNotFound,
)

MAX_MESSAGE = 300
MAX_RETRY_AFTER_S = 30

MAX_DETAILS_BYTES = 2048
"""The body with everything else stays below 4 KiB."""

_REFUSALS: list[type[PromptRefused]] = [PromptRefused, *PromptRefused.__subclasses__()]
_PROMPT_ERRORS: dict[str, type[PromptmuxError]] = {refusal.code: refusal for refusal in _REFUSALS}
_STORE_ERRORS: dict[str, type[PromptmuxError]] = {
    error.code: error
    for error in (
        InvalidParameter,
        PromptNotFound,
        VersionNotFound,
        VersionMismatch,
        RegistryFull,
        StorageFull,
        StorageFailed,
        PromptQuarantined,
    )
}

log = structlog.get_logger(__name__)


def request_id_of(scope: Any) -> str:
    """The id that the edge middleware gave this request."""
    found: str = scope.get("promptmux.request_id", "")
    return found


def as_promptmux_error(error: BaseException) -> PromptmuxError:
    """Any exception as a member of our tree; what we do not know becomes an opaque `internal`."""
    if isinstance(error, PromptmuxError):
        return error
    if isinstance(error, PromptFileError):
        return _PROMPT_ERRORS[error.code](str(error))
    if isinstance(error, StoreError):
        return _STORE_ERRORS[error.code](str(error))
    if isinstance(error, HTTPException):
        if error.status_code == http.HTTPStatus.NOT_FOUND:
            return RouteNotFound("There is no such route; see /openapi.json.")
        if error.status_code == http.HTTPStatus.METHOD_NOT_ALLOWED:
            return MethodNotAllowed("This route has no such method; see /openapi.json.")
        return BadRequest("The request cannot be understood.")
    return Internal("The server failed on this request; it is logged under its request id.")


def error_object(error: PromptmuxError, request_id: str) -> dict[str, Any]:
    """The `error` member of an answer or of one item."""
    written: dict[str, Any] = {
        "code": error.code,
        "message": error.message[:MAX_MESSAGE],
        "type": "invalid_request_error" if error.status < 500 else "server_error",
        "param": error.param,
        "request_id": request_id,
        "retryable": error.retryable,
    }
    if error.details is not None and len(json.dumps(error.details)) <= MAX_DETAILS_BYTES:
        written["details"] = dict(error.details)
    return written


def error_response(error: PromptmuxError, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a failed request; `headers` are added to those that the error itself asks for."""
    body = {
        "type": f"urn:promptmux:error:{error.code}",
        "title": error.code.replace("_", " "),
        "status": error.status,
        "detail": error.message[:MAX_MESSAGE],
        "instance": f"urn:promptmux:request:{request_id}",
        "error": error_object(error, request_id),
    }
    return Response(
        json.dumps(body, allow_nan=False), error.status, {**_headers(error), **(headers or {})}, "application/json"
    )


def _headers(error: PromptmuxError) -> dict[str, str]:
    if error.status == http.HTTPStatus.UNAUTHORIZED:
        return {"WWW-Authenticate": "Bearer"}
    if error.status in (http.HTTPStatus.TOO_MANY_REQUESTS, http.HTTPStatus.SERVICE_UNAVAILABLE):
        # Spread, so that callers who are turned away together do not come back together.
        wait_s = min(error.retry_after_s or random.randint(1, 4), MAX_RETRY_AFTER_S)
        return {"Retry-After": str(max(1, math.ceil(wait_s)))}
    return {}


async def handle(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for everything."""
    known = as_promptmux_error(error)
    if isinstance(known, Internal):
        log.error("request failed", request_id=request_id_of(request.scope), exc_info=error)
    allowed = None
    if isinstance(known, MethodNotAllowed):
        allowed = {"Allow": ", ".join(allowed_methods(request.app.routes, request.scope))}
    return error_response(known, request_id_of(request.scope), allowed)
