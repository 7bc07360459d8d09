"""`AsyncClient.trainings`: the same methods as `Client.trainings`, for code that awaits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

import httpx2

from promptmux import _training_wire as wire
from promptmux._errors import ConnectionFailed, RequestTimeout
from promptmux._retry import RetryPolicy
from promptmux._training_models import Training, TrainingEvent, TrainingStatus
from promptmux._training_wire import Config
from promptmux._wire import Call


class Send(Protocol):
    async def __call__(self, call: Call, *, stream: bool = False) -> httpx2.Response: ...


class AsyncTrainings:
    """The trainings of one server. All of it needs a key of scope `admin`."""

    def __init__(self, send: Send, retry: RetryPolicy) -> None:
        self._send, self._retry = send, retry

    async def submit(
        self,
        config: Config,
        *,
        priority: int = 0,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Training:
        """Queue a training: TOML text, a `Path` of its file, or a mapping. Paths in it are the server's.

        InvalidRequest names field and line of a mistake, Conflict another training into the same output folder. A
        repeated `idempotency_key` gives the training that it gave before.
        """
        call = wire.submit_call(config, priority=priority, metadata=metadata, key=idempotency_key)
        return wire.read_training(await self._send(call))

    async def get(self, training_id: str) -> Training:
        """As it is now, with its configuration."""
        return wire.read_training(await self._send(wire.get_call(training_id)))

    async def list(self, status: TrainingStatus | None = None) -> AsyncIterator[Training]:
        """Every training, or those of a status, newest first; asked for page by page."""
        after = None
        while True:
            found, after = wire.read_trainings(await self._send(wire.list_call(status, after)))
            for training in found:
                yield training
            if after is None:
                return

    async def cancel(self, training_id: str) -> Training:
        """End it: at once if it waits, behind its step if it runs. One that has ended stays as it is."""
        return wire.read_training(await self._send(wire.cancel_call(training_id)))

    async def events(self, training_id: str, after: int = 0) -> AsyncIterator[TrainingEvent]:
        """What it tells behind event number `after`, as it is told, to its end.

        A stream that breaks off is taken up again where it was; raises ConnectionFailed, or RequestTimeout for a
        server that fell silent, when nothing comes of that several times in a row.
        """
        events, attempt = wire.TrainingEvents(after), 0
        while not events.complete:
            response = await self._send(wire.events_call(training_id, events.after), stream=True)
            events.opened(response)
            failure: ConnectionFailed | RequestTimeout = ConnectionFailed("The stream ended before the training did.")
            try:
                async for line in response.aiter_lines():
                    if (event := events.read(line)) is not None:
                        attempt = 0
                        yield event
            except httpx2.TimeoutException:
                failure = RequestTimeout("The server fell silent.")
            except httpx2.TransportError as error:
                failure = ConnectionFailed(f"The stream broke off: {error}")
            finally:
                await response.aclose()
            if not events.complete:
                delay_s = self._retry.delay_s(attempt, None)
                if delay_s is None:
                    raise failure
                await asyncio.sleep(delay_s)
                attempt += 1
