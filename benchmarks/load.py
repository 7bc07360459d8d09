"""Load on an engine: so many requests in flight (closed loop), or requests at given times (open loop).

Owns when a request is sent and how it ended. In an open loop a request's wait begins when it was due: a sender that
falls behind adds to the waits and hides nothing. Knows nothing of what is measured with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from promptmux_server.engine.engine import Engine
from promptmux_server.engine.request import Answer, Request
from promptmux_server.errors import PromptmuxError


@dataclass(eq=False)
class Call:
    """One request on its way; times are `time.monotonic()` seconds."""

    request: Request
    due: float
    ended: float = 0.0
    refused_after_s: float | None = None
    """How long the engine took to refuse it; None = it was admitted."""
    error: str | None = None
    """The code of what it failed with."""
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def wait_s(self) -> float:
        return self.ended - self.due

    @property
    def in_time(self) -> bool:
        """Answered before its deadline; the engine lets a step that it has begun run over."""
        return self.error is None and self.ended <= self.request.deadline

    def end(self, error: BaseException | None) -> None:
        self.ended = time.monotonic()
        self.error = None if error is None else error.code if isinstance(error, PromptmuxError) else repr(error)
        self.over.set()


def send(
    engine: Engine, request: Request, due: float | None = None, on_end: Callable[[], object] = lambda: None
) -> Call:
    """Submit a request; `due` is now unless given. `on_end` is called once, on whatever thread ends it."""
    began = time.monotonic()
    call = Call(request, began if due is None else due)

    def end(future: Future[Answer]) -> None:
        call.end(future.exception())
        on_end()

    try:
        engine.submit(request).add_done_callback(end)
    except PromptmuxError as error:
        call.end(error)
        call.refused_after_s = call.ended - began
        on_end()
    return call


def closed_loop(engine: Engine, requests: Iterable[Request], in_flight: int) -> list[Call]:
    """Send each request as soon as fewer than `in_flight` are on their way; returns when all have ended."""
    free, calls = threading.Semaphore(in_flight), []
    for request in requests:
        free.acquire()
        calls.append(send(engine, request, on_end=free.release))
    return ended(calls)


def open_loop(engine: Engine, timeline: Iterable[tuple[float, Request]], timeout_s: float) -> list[Call]:
    """Send requests at their seconds from now, each with a deadline `timeout_s` later; returns when all have ended."""
    begun, calls = time.monotonic(), []
    for at_s, request in timeline:
        due = begun + at_s
        time.sleep(max(0.0, due - time.monotonic()))
        calls.append(send(engine, replace(request, deadline=due + timeout_s), due))
    return ended(calls)


def ended(calls: list[Call]) -> list[Call]:
    for call in calls:
        call.over.wait()
    return calls


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Seconds of `count` arrivals at random, `rate` a second on average."""
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, count)
    return [float(at_s) for at_s in gaps.cumsum()]


def answered_per_s(calls: Sequence[Call], start: float, stop: float) -> float:
    """Answers in time, a second, of those that ended between two times."""
    return sum(call.in_time and start <= call.ended < stop for call in calls) / (stop - start)


def percentile(values: Iterable[float], percent: float) -> float:
    """NaN of nothing."""
    found = list(values)
    return float(np.percentile(found, percent)) if found else float("nan")
