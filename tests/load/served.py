"""The real engine on the tiny backbone, on a device that is slow on purpose, behind a real socket; and its books."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

import tiny
from api.live_server import live_server
from promptmux_prompts import Prompt
from promptmux_server.api.app import Application, build_app
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.options import EngineOptions
from promptmux_server.settings import Settings

PROBE_S = 0.005


class SlowDevice:
    """The tiny model, with what a pass would take: so long for each row of the encoder, so long for a decoding step.

    A step costs the same whatever the batch, so a full batch is the best one; the encoder's cost is that of its rows,
    so it does not matter who joins together with whom.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encode_s: float, step_s: float) -> None:
        self.encode_s, self.step_s = encode_s, step_s
        self.busy_s = 0.0
        self.encoded = self.stepped = 0
        """Rows that passed the encoder; rows of all decoding steps."""
        self._encode, self._step = tiny.model().encode, tiny.model().step
        monkeypatch.setattr(tiny.model(), "encode", self.encode, raising=False)
        monkeypatch.setattr(tiny.model(), "step", self.step, raising=False)

    def turn_s(self, joining: int) -> float:
        """A turn of the engine's loop: so many join, then all take a step."""
        return self.encode_s * joining + self.step_s

    def encode(self, rows: Sequence[Any], prompts: Any) -> Any:
        self.encoded += len(rows)
        self._work(self.encode_s * len(rows))
        return self._encode(rows, prompts)

    def step(self, beams: Any, *rest: Any) -> Any:
        self.stepped += len(beams.groups)
        self._work(self.step_s)
        return self._step(beams, *rest)

    def _work(self, seconds: float) -> None:
        self.busy_s += seconds
        time.sleep(seconds)


@dataclass
class Lag:
    """How much later than asked for a timer fires, in seconds: on the server's event loop, and on a plain thread."""

    loop: list[float] = field(default_factory=list)
    thread: list[float] = field(default_factory=list)


class LoopProbe:
    """An application around ours; measures its event loop from the first request on."""

    def __init__(self, app: ASGIApp, lag: Lag) -> None:
        self._app, self._lag = app, lag
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._measure())
        await self._app(scope, receive, send)

    async def _measure(self) -> None:
        while True:
            asked = time.monotonic() + PROBE_S
            await asyncio.sleep(PROBE_S)
            self._lag.loop.append(time.monotonic() - asked)


@contextmanager
def thread_probe(lag: Lag) -> Iterator[None]:
    """The machine's own share of the lag, busy as it is with this run and with others."""
    over = threading.Event()

    def measure() -> None:
        while not over.is_set():
            asked = time.monotonic() + PROBE_S
            time.sleep(PROBE_S)
            lag.thread.append(time.monotonic() - asked)

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    engine: Engine
    application: Application
    port: int

    def items(self, outcome: str) -> int:
        """Items that ended so, of all tasks, by the metrics."""
        return self._total("promptmux_items_total", outcome=outcome)

    def answers(self, status: int | None = None) -> int:
        """HTTP answers to predictions, by the metrics; 499 = the client left."""
        chosen = {} if status is None else {"status": str(status)}
        return self._total("promptmux_http_requests_total", route="/v1/predict", **chosen)

    def gauges(self) -> dict[str, float]:
        """What must be zero when nobody asks for anything."""
        registry = self.application.metrics.registry
        names = ("num_requests_waiting", "num_requests_running", "prompt_waiting")
        found = {name: registry.get_sample_value(f"promptmux_{name}") for name in names}
        for memory in ("decode_cache", "cross_memory"):
            found[memory] = registry.get_sample_value("promptmux_memory_used_bytes", {"memory": memory})
        assert None not in found.values()
        held = sum(version.held for version in self.engine._tiers._versions.values())
        return {**{name: value or 0.0 for name, value in found.items()}, "prompts_held": held}

    def _total(self, name: str, **labels: str) -> int:
        samples = (sample for metric in self.application.metrics.registry.collect() for sample in metric.samples)
        return sum(int(s.value) for s in samples if s.name == name and labels.items() <= s.labels.items())

    def is_idle(self) -> bool:
        return not any(self.gauges().values())


@contextmanager
def served(
    folder: Path,
    *prompts: Prompt,
    options: EngineOptions,
    settings: Settings | None = None,
    around: Callable[[ASGIApp], ASGIApp] = lambda app: app,
) -> Iterator[Served]:
    """Serve these prompts on a free port; `around` wraps the application."""
    tiny.write(folder, *prompts)
    engine = tiny.engine(folder, options)
    engine.start()
    try:
        application = build_app(engine, settings or Settings(queue_size=options.queue_size), "tiny")
        with live_server(around(application.asgi)) as port:
            yield Served(engine, application, port)
    finally:
        engine.stop(2.0)


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that `part` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
