"""The one place that turns an exception into an answer.

Owns the error body, which is an RFC 9457 problem and OpenAI's `error` object at once, and the map from every exception
that can reach the edge. A message that is not known to be safe to show never leaves: it becomes an opaque 500.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from promptmux_prompts.errors import PromptFileError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from promptmux_server.api.field_names import known_path
from promptmux_server.errors import (
    BadRequest,
    ClientLeft,
    Internal,
    InvalidParameter,
    MethodNotAllowed,
    PromptmuxError,
    RouteNotFound,
)

MAX_MESSAGE_CHARS = 300
MAX_RETRY_AFTER_S = 30
OPAQUE = "The server failed on this request; its log has the details under this request id."

OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An error as the caller sees it."""

    status: int
    code: str
    message: str
    param: str | None = None
    retryable: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


def problem_of(error: BaseException) -> Problem:
    """The map. Every class of both error trees has its own entry; anything else is an opaque 500."""
    if isinstance(error, PromptFileError):
        return Problem(status=422, code=error.code, message=_short(str(error)))
    if not isinstance(error, PromptmuxError):
        error = _translated(error)
    headers = {}
    if error.status in (429, 503):
        # Spread, so that callers turned away together do not come back together.
        wait_s = error.retry_after_s or random.randint(1, 4)
        headers["Retry-After"] = str(min(max(wait_s, 1), MAX_RETRY_AFTER_S))
    return Problem(
        status=error.status,
        code=error.code,
        message=OPAQUE if error.status == 500 else _short(error.message),
        param=error.param,
        retryable=error.retryable,
        headers=headers,
    )


def _translated(error: BaseException) -> PromptmuxError:
    """Other people's exceptions, in our tree."""
    if isinstance(error, RequestValidationError):
        return _invalid_parameter(error)
    if isinstance(error, ClientDisconnect):
        return ClientLeft("The client closed the connection.")
    if isinstance(error, HTTPException) and error.status_code < 500:
        if error.status_code == 404:
            return RouteNotFound("There is no such route; GET /openapi.json lists them.")
        if error.status_code == 405:
            return MethodNotAllowed("This route does not take this method; the Allow header lists those it takes.")
        return BadRequest("The request cannot be understood.")
    return Internal(OPAQUE)


def _invalid_parameter(error: RequestValidationError) -> InvalidParameter:
    """The first finding only, in pydantic's words for it, which hold bounds and choices but never the value sent."""
    first = error.errors()[0]
    unknown = first["type"] == "extra_forbidden"
    path = known_path(first["loc"])
    message = "An unknown field was sent here; GET /openapi.json lists the known ones." if unknown else first["msg"] + "."
    return InvalidParameter(message, param=path)


def error_object(problem: Problem, request_id: str) -> dict[str, Any]:
    """The `error` member: OpenAI's fields plus request_id and retryable."""
    fallback = "invalid_request_error" if problem.status < 500 else "server_error"
    return {
        "code": problem.code,
        "message": problem.message,
        "type": OPENAI_TYPES.get(problem.status, fallback),
        "param": problem.param,
        "request_id": request_id,
        "retryable": problem.retryable,
    }


def problem_body(problem: Problem, request_id: str) -> dict[str, Any]:
    """The whole body: RFC 9457 members around the `error` object."""
    return {
        "type": f"urn:promptmux:error:{problem.code}",
        "title": _title(problem.status),
        "status": problem.status,
        "detail": problem.message,
        "instance": f"urn:promptmux:request:{request_id}",
        "error": error_object(problem, request_id),
    }


def problem_response(
    problem: Problem, request_id: str, *, accept: str = "", headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer. Always application/json, or application/problem+json for a caller whose Accept names it."""
    wants_problem = "application/problem+json" in accept
    return JSONResponse(
        problem_body(problem, request_id),
        status_code=problem.status,
        headers={**problem.headers, **(headers or {})},
        media_type="application/problem+json" if wants_problem else "application/json",
    )


def _title(status: int) -> str:
    return "Client Closed Request" if status == 499 else HTTPStatus(status).phrase


def _short(message: str) -> str:
    """One line of bounded length without control characters."""
    line = " ".join(message.split())
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 1] + "…"
