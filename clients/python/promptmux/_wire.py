"""Requests built and responses read: everything that the two clients share. Nothing here sends anything."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from promptmux._errors import BY_CODE, APIStatusError, ConnectionFailed, ServerError, class_for
from promptmux._images import ImageSource, to_base64
from promptmux._models import Answer, Item, Task
from promptmux._upload import Upload

Listed = TypeVar("Listed", bound=BaseModel)

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 70.0
"""A little more than the longest deadline a server grants."""


@dataclass(frozen=True)
class Call:
    """One HTTP call, as often as it has to be sent: a body is made anew for each try."""

    method: str
    path: str
    body: Any = None
    """Sent as JSON."""
    upload: Upload | None = None
    """Sent as it is, in place of `body`."""
    params: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    """Whether doing it twice is the same as doing it once, so that it may be sent again after its answer was lost."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of httpx2's `build_request`, but for the content of an upload."""
        return {
            "method": self.method,
            "url": self.path,
            "params": self.params or None,
            "headers": self.headers,
            "json": self.body,
        }


def client_options(base_url: str | None, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Keyword arguments of httpx2's clients; PROMPTMUX_URL and PROMPTMUX_API_KEY are the defaults."""
    key = api_key or os.environ.get("PROMPTMUX_API_KEY")
    return {
        "base_url": base_url or os.environ.get("PROMPTMUX_URL") or DEFAULT_URL,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "timeout": timeout_s,
    }


def predict_body(items: Sequence[Item], **options: Any) -> dict[str, Any]:
    return _given(items=[_item(item) for item in items], **options)


def fanout_body(image: ImageSource | None, tasks: Sequence[str | Item], **options: Any) -> dict[str, Any]:
    """Raises ValueError for an item with a picture or an id of its own: a fan-out has one picture."""
    items = [Item(task=task) if isinstance(task, str) else task for task in tasks]
    if any(item.image is not None or item.id is not None for item in items):
        raise ValueError("an item of a fan-out has neither a picture nor an id of its own")
    return _given(tasks=[_item(item) for item in items], image=None if image is None else to_base64(image), **options)


def _given(**fields: Any) -> dict[str, Any]:
    """Without what was left out."""
    return {name: value for name, value in fields.items() if value is not None}


def _item(item: Item) -> dict[str, Any]:
    return _given(
        id=item.id,
        task=item.task,
        image=None if item.image is None else to_base64(item.image),
        text=item.text,
        premise=item.premise,
        decoding=None if item.decoding is None else dict(item.decoding),
    )


def read_answers(response: httpx2.Response) -> list[Answer]:
    """Raises ServerError for a body that is not ours."""
    raw = _read(response)
    try:
        return [Answer.model_validate(answer) for answer in raw["answers"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise not_understood(response) from error


def tasks_call(after: str | None) -> Call:
    return Call("GET", "/v1/tasks", params=_given(after=after))


def read_tasks(response: httpx2.Response) -> tuple[list[Task], str | None]:
    """One page, and the name after which the next one begins; None = there is no other."""
    return read_page(response, "tasks", Task)


def read_page(response: httpx2.Response, member: str, model: type[Listed]) -> tuple[list[Listed], str | None]:
    """The list `member` of an answer, and its `next`; raises ServerError for a body that is not ours."""
    raw = _read(response)
    try:
        return [model.model_validate(one) for one in raw[member]], raw.get("next")
    except (KeyError, TypeError, ValidationError) as error:
        raise not_understood(response) from error


def read_object(response: httpx2.Response) -> dict[str, Any]:
    return _read(response)


def only_answer(answers: Sequence[Answer]) -> Answer:
    """The answer of a single item; raises its error."""
    answer = answers[0]
    if answer.error is not None:
        error = answer.error
        raise BY_CODE.get(error.code, APIStatusError)(
            error.message,
            status=200,
            code=error.code,
            param=error.param,
            request_id=error.request_id,
            retryable=error.retryable,
        )
    return answer


def _read(response: httpx2.Response) -> dict[str, Any]:
    try:
        raw = response.json()
    except ValueError as error:
        raise ServerError("The server's answer is not JSON.", status=response.status_code) from error
    if isinstance(raw, dict):
        return raw
    raise not_understood(response)


def not_understood(response: httpx2.Response) -> ServerError:
    return ServerError("The server's answer is not understood.", status=response.status_code)


def connection_failed(call: Call, base_url: httpx2.URL, error: httpx2.TransportError) -> ConnectionFailed:
    """The error of a call that may be sent again; raises that of one that may not, unless it never left."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx2.ConnectError):
        told = f"Cannot reach {base_url}: {reason}"
    elif not call.repeatable:
        told = f"The connection to {base_url} broke before the answer came; look whether the change was made: {reason}"
        raise ConnectionFailed(told) from error
    elif call.upload is not None:
        # Who refuses a long body closes; what was said before is lost if the break is seen first.
        told = f"The connection to {base_url} broke; perhaps the key or the file's size was refused: {reason}"
    else:
        told = f"The connection to {base_url} broke: {reason}"
    failure = ConnectionFailed(told)
    failure.__cause__ = error
    return failure


def raise_for(response: httpx2.Response) -> NoReturn:
    """Raise the error that a response carries; a proxy's page without our body gives its status alone."""
    try:
        raw = response.json()
    except ValueError:
        raw = None
    raw = raw if isinstance(raw, dict) else {}
    error = raw.get("error") if isinstance(raw.get("error"), dict) else {}
    assert isinstance(error, dict)
    code = str(error.get("code") or "unknown")
    details = error.get("details")
    raise class_for(response.status_code, code)(
        str(error.get("message") or raw.get("detail") or f"HTTP status {response.status_code}"),
        status=response.status_code,
        code=code,
        param=error.get("param"),
        request_id=error.get("request_id") or response.headers.get("x-request-id"),
        retryable=bool(error.get("retryable", False)),
        details=details if isinstance(details, dict) else None,
    )
