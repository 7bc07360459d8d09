"""The client for code that awaits; the same methods as `Client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

import httpx2

from promptmux import _wire
from promptmux._async_prompts import AsyncPrompts
from promptmux._async_trainings import AsyncTrainings
from promptmux._errors import ConnectionFailed, RequestTimeout
from promptmux._events import EventReader
from promptmux._images import ImageSource
from promptmux._models import Answer, Delta, Item, Priority, Task
from promptmux._retry import RetryPolicy
from promptmux._wire import Call


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
        self.prompts = AsyncPrompts(self._send)
        """What the server can serve: publish it, look at it, roll it back."""
        self.trainings = AsyncTrainings(self._send, self._retry)
        """Prompts that the server's workers learn: ask for one, follow it, end it."""

    async def predict(
        self,
        *,
        task: str,
        image: ImageSource | None = None,
        text: str | None = None,
        premise: str | None = None,
        deadline_ms: int | None = None,
        priority: Priority | None = None,
        **decoding: Any,
    ) -> Answer:
        """Ask one task; further keywords (`beam_size=3`) override its decoding. Raises APIStatusError and its kin."""
        item = Item(task=task, image=image, text=text, premise=premise, decoding=decoding or None)
        return _wire.only_answer(await self.predict_many([item], deadline_ms=deadline_ms, priority=priority))

    async def predict_many(
        self, items: Sequence[Item], *, deadline_ms: int | None = None, priority: Priority | None = None
    ) -> list[Answer]:
        """Ask items of any tasks in one batch; answers come in their order, a failed one with `error`."""
        body = _wire.predict_body(items, deadline_ms=deadline_ms, priority=priority)
        return _wire.read_answers(await self._send(Call("POST", "/v1/predict", body)))

    async def fanout(
        self,
        image: ImageSource | None,
        tasks: Sequence[str | Item],
        *,
        text: str | None = None,
        premise: str | None = None,
        deadline_ms: int | None = None,
        priority: Priority | None = None,
    ) -> list[Answer]:
        """Ask many tasks about one picture, which is sent and decoded once; answers come in the order of tasks.

        Text and premise go to the tasks that take them; an `Item` in place of a name brings its own.
        """
        body = _wire.fanout_body(image, tasks, text=text, premise=premise, deadline_ms=deadline_ms, priority=priority)
        return _wire.read_answers(await self._send(Call("POST", "/v1/fanout", body)))

    async def stream(
        self,
        *,
        task: str,
        image: ImageSource | None = None,
        text: str | None = None,
        premise: str | None = None,
        deadline_ms: int | None = None,
        priority: Priority | None = None,
        **decoding: Any,
    ) -> AsyncIterator[Delta | Answer]:
        """The same as `predict`, as it comes: a Delta per piece of text, then the Answer.

        Only texts that are searched one token after the other grow (`beam_size=1`, `method="sample"`); any other answer
        comes alone. Raises as `predict` does, and ConnectionFailed for a stream that breaks off.
        """
        item = Item(task=task, image=image, text=text, premise=premise, decoding=decoding or None)
        async for event in self.stream_many([item], deadline_ms=deadline_ms, priority=priority):
            yield event if isinstance(event, Delta) else _wire.only_answer([event])

    async def stream_many(
        self, items: Sequence[Item], *, deadline_ms: int | None = None, priority: Priority | None = None
    ) -> AsyncIterator[Delta | Answer]:
        """The same as `predict_many`, as it comes: pieces and answers of all items, told apart by `id`."""
        body = _wire.predict_body(items, deadline_ms=deadline_ms, priority=priority, stream=True)
        response, events = await self._send(Call("POST", "/v1/predict", body), stream=True), EventReader()
        try:
            async for line in response.aiter_lines():
                if (event := events.read(line)) is not None:
                    yield event
        except httpx2.TimeoutException as error:
            raise RequestTimeout("The server fell silent.") from error
        except httpx2.TransportError as error:
            raise ConnectionFailed(f"The stream broke off: {error}") from error
        finally:
            await response.aclose()
        events.close()

    async def tasks(self) -> list[Task]:
        """Every task of the server, served or refused."""
        found, after = _wire.read_tasks(await self._send(_wire.tasks_call(None)))
        while after is not None:
            more, after = _wire.read_tasks(await self._send(_wire.tasks_call(after)))
            found += more
        return found

    async def version(self) -> dict[str, Any]:
        """Versions of server and backbone."""
        return _wire.read_object(await self._send(Call("GET", "/version")))

    async def ready(self) -> bool:
        """Whether the server welcomes requests now; False if it cannot be reached."""
        try:
            return (await self._http.get("/readyz")).is_success
        except httpx2.TransportError:
            return False

    async def _send(self, call: Call, *, stream: bool = False) -> httpx2.Response:
        """The response, of which a stream is still to be read and closed; raises the class of a refusal's status."""
        attempt = 0
        while True:
            response: httpx2.Response | None = None
            try:
                content = None if call.upload is None else call.upload.pieces_async()
                request = self._http.build_request(**call.options, content=content)
                response = await self._http.send(request, stream=stream)
                if response.is_success:
                    return response
                await response.aread()
            except httpx2.TimeoutException as error:
                raise RequestTimeout("The server did not answer in time.") from error
            except httpx2.TransportError as error:
                failure, response = _wire.connection_failed(call, self._http.base_url, error), None
            delay_s = self._retry.delay_s(attempt, response, repeatable=call.repeatable)
            if delay_s is None:
                if response is None:
                    raise failure
                _wire.raise_for(response)
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
