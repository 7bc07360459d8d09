"""The client for code that awaits; the same methods as `Client`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import httpx2

from promptmux import _wire
from promptmux._errors import ConnectionFailed, RequestTimeout
from promptmux._images import ImageSource
from promptmux._models import Answer, Item, Task
from promptmux._retry import RetryPolicy


class AsyncClient:
    """Talks to one server. Use it as an async context manager, or await `close`; it may be shared by tasks."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = _wire.TIMEOUT_S,
        retry: RetryPolicy | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx2.AsyncClient(**_wire.client_options(base_url, api_key, timeout_s), transport=transport)
        self._retry = retry or RetryPolicy()

    async def predict(
        self,
        *,
        task: str,
        image: ImageSource | None = None,
        text: str | None = None,
        premise: str | None = None,
        deadline_ms: int | None = None,
        **decoding: Any,
    ) -> Answer:
        """Ask one task; further keywords (`beam_size=3`) override its decoding. Raises APIStatusError and its kin."""
        item = Item(task=task, image=image, text=text, premise=premise, decoding=decoding or None)
        return _wire.only_answer(await self.predict_many([item], deadline_ms=deadline_ms))

    async def predict_many(self, items: Sequence[Item], *, deadline_ms: int | None = None) -> list[Answer]:
        """Ask items of any tasks in one batch; answers come in their order, a failed one with `error`."""
        return _wire.read_answers(await self._send("POST", "/v1/predict", _wire.predict_body(items, deadline_ms)))

    async def tasks(self) -> list[Task]:
        """Every task of the server, served or refused."""
        return _wire.read_tasks(await self._send("GET", "/v1/tasks"))

    async def version(self) -> dict[str, Any]:
        """Versions of server and backbone."""
        return _wire.read_object(await self._send("GET", "/version"))

    async def ready(self) -> bool:
        """Whether the server welcomes requests now; False if it cannot be reached."""
        try:
            return (await self._http.get("/readyz")).is_success
        except httpx2.TransportError:
            return False

    async def _send(self, method: str, path: str, body: Any = None) -> httpx2.Response:
        attempt = 0
        while True:
            response: httpx2.Response | None = None
            try:
                response = await self._http.request(method, path, json=body)
                if response.is_success:
                    return response
            except httpx2.TimeoutException as error:
                raise RequestTimeout("The server did not answer in time.") from error
            except httpx2.TransportError as error:
                failure = ConnectionFailed(f"Cannot reach {self._http.base_url}: {error}")
                failure.__cause__ = error
            delay_s = self._retry.delay_s(attempt, response)
            if delay_s is None:
                if response is None:
                    raise failure
                return response
            await asyncio.sleep(delay_s)
            attempt += 1

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
