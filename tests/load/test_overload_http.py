"""Four and ten times what the server can do, over real sockets: it does as much as ever, and tells the rest (A-14).

The books balance afterwards (A-27), and the event loop never stops (A-29).
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.types import ASGIApp

import tiny
from api.live_server import until
from load.callers import Reply, call, crowd, get
from load.served import Lag, LoopProbe, Served, SlowDevice, quantile, resident_bytes, served, thread_probe
from promptmux_server.backbone import images
from promptmux_server.engine.cost_model import CostModel
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.scheduler import FairQueue
from promptmux_server.settings import Settings

BATCH, CAP = 4, 8
"""A full batch runs and another waits: with no more than that ahead, whoever is admitted is in time."""
ENDLESS = 100_000
GREEDY = {"method": "greedy", "min_length": 2, "max_length": 2}
ROUNDS, OVERLOAD_S, MEASURE_S = 3, 3.0, 2.0
"""Capacity and overload are measured in turns, as the machine may become busier or less so."""


def bodies(deadline_ms: int | None = None) -> list[dict[str, Any]]:
    """Requests, every fourth with a picture of its own."""
    chance = random.Random(1)
    fields = {} if deadline_ms is None else {"deadline_ms": deadline_ms}
    made = []
    for index in range(400):
        picture = {} if index % 4 else {"image": png(chance)}
        made.append({"task": "a", "text": tiny.text(chance, 3), **picture, **fields})
    return made


def png(chance: random.Random) -> str:
    """A small picture, base64."""
    pixels = np.frombuffer(chance.randbytes(16 * 16 * 3), dtype=np.uint8).reshape(16, 16, 3)
    kept = io.BytesIO()
    Image.fromarray(pixels).save(kept, "PNG")
    return base64.b64encode(kept.getvalue()).decode()


@dataclass(frozen=True)
class Overload:
    """What came of it."""

    capacities: list[float]
    """Answers a second of each closed loop."""
    quiet_p99_s: float
    deadline_s: float
    rounds: list[list[Reply]]
    health: list[Reply]
    deepest: int
    """The most that ever waited in the engine's queue."""
    decoded: int
    """Pictures."""
    grown_bytes: int

    @property
    def replies(self) -> list[Reply]:
        return [reply for replies in self.rounds for reply in replies]

    @property
    def goodput(self) -> float:
        """Answers in time, as a part of the capacity: of its lowest measurement, for so far apart they may be alike."""
        good = sum(
            reply.seconds <= self.deadline_s and reply.status == 200 for reply in within(self.replies, OVERLOAD_S)
        )
        return good / len(self.rounds) / OVERLOAD_S / min(self.capacities)


def within(replies: list[Reply], seconds: float) -> list[Reply]:
    """Without the answers to what still waited when the crowd stopped asking."""
    return [reply for reply in replies if reply.ended <= seconds]


def healthy(port: int, over: threading.Event) -> list[Reply]:
    replies = []
    while not over.wait(0.1):
        replies += [asyncio.run(call(port, get(path))) for path in ("/livez", "/readyz")]
    return replies


def capacity(port: int, seed: int) -> float:
    return len(within(crowd(port, bodies(), MEASURE_S, seed=seed, clients=CAP), MEASURE_S)) / MEASURE_S


def overload(server: Served, times: float, counted: Counter[str], rounds: int) -> Overload:
    port, capacities, replies = server.port, [], []
    crowd(port, bodies(), 0.5, seed=0, clients=2)  # what is done once is done
    quiet = quantile([reply.seconds for reply in crowd(port, bodies(), MEASURE_S, seed=1, clients=1)], 0.99)
    deadline_ms, held, decoded = round(5000 * quiet), resident_bytes(), 0
    over = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        health = beside.submit(healthy, port, over)
        for number in range(rounds):
            capacities.append(capacity(port, 10 + number))
            counted["decoded"] = 0
            rate = times * capacities[-1]
            replies.append(crowd(port, bodies(deadline_ms), OVERLOAD_S, seed=20 + number, rate=rate))
            until(server.is_idle)
            decoded += counted["decoded"]
        over.set()
    grown = resident_bytes() - held
    return Overload(capacities, quiet, deadline_ms / 1000, replies, health.result(), counted["deepest"], decoded, grown)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How deep the queue was, how many pictures were decoded."""
    counts: Counter[str] = Counter()
    put, decode = FairQueue.put, images.decode_image

    def count_put(self: Any, *rest: Any) -> None:
        put(self, *rest)
        counts["deepest"] = max(counts["deepest"], len(self))

    def count_decode(*rest: Any) -> Any:
        counts["decoded"] += 1
        return decode(*rest)

    monkeypatch.setattr(FairQueue, "put", count_put)
    monkeypatch.setattr(images, "decode_image", count_decode)
    return counts


def limits(cap: int) -> tuple[EngineOptions, Settings]:
    options = EngineOptions(max_batch=BATCH, queue_size=cap, queue_per_key=cap, queue_per_task=cap)
    return options, Settings(queue_size=cap)


@pytest.mark.parametrize(("times", "rounds"), [(4.0, ROUNDS), pytest.param(10.0, 1, marks=pytest.mark.soak)])
def test_many_times_the_load_costs_no_goodput_and_the_rest_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counter[str], times: float, rounds: int
) -> None:
    SlowDevice(monkeypatch, encode_s=0.01, step_s=0.04)
    lag = Lag()

    def probed(app: ASGIApp) -> ASGIApp:
        return LoopProbe(app, lag)

    options, settings = limits(CAP)
    prompt = tiny.prompt("a", decoding=GREEDY)
    with served(tmp_path, prompt, options=options, settings=settings, around=probed) as server, thread_probe(lag):
        started = time.monotonic()
        run = overload(server, times, counted, rounds)
        assert time.monotonic() - started < 60
        again = crowd(server.port, bodies(), 1.0, seed=9, clients=1)
        late_s = 2 * quantile(lag.thread, 0.99)
        check_answers(run, late_s)
        check_refusals(run, late_s)
        check_health(run, late_s)
        check_books(server, run)
        check_loop(lag)
    assert {reply.status for reply in again} == {200}
    assert quantile([reply.seconds for reply in again], 0.5) <= 1.2 * run.quiet_p99_s + late_s


def check_answers(run: Overload, late_s: float) -> None:
    statuses = Counter(reply.status for reply in run.replies)
    assert set(statuses) <= {200, 429, 503, 504}
    assert statuses[503] > statuses[200]  # the control: it was an overload
    assert run.goodput >= 0.90, (run.goodput, statuses, run.capacities)
    accepted = [reply.seconds for reply in run.replies if reply.status in (200, 504)]
    assert quantile(accepted, 0.99) <= run.deadline_s + late_s
    assert 0 < run.deepest <= CAP
    assert run.grown_bytes <= 100 << 20


def check_refusals(run: Overload, late_s: float) -> None:
    refused = [reply for reply in run.replies if reply.status in (429, 503)]
    waits = {int(reply.retry_after or "") for reply in refused}
    assert waits <= set(range(1, 31))
    assert len(waits) > 1
    check_seconds([reply.seconds for reply in refused], late_s)
    with_picture = Counter(reply.status for reply in run.replies if "image" in reply.sent)
    # One that is late before its turn to be decoded is not decoded either.
    assert with_picture[200] <= run.decoded <= with_picture[200] + with_picture[504]


def check_health(run: Overload, late_s: float) -> None:
    assert len(run.health) > 20
    assert {reply.status for reply in run.health} == {200}
    check_seconds([reply.seconds for reply in run.health], late_s)


def check_seconds(seconds: list[float], late_s: float) -> None:
    """Half of the replies within 50 ms, and 99 of 100 within 0.3 s.

    On a machine of its own they take 5 ms. Here clients, device and other tests share two cores with the server, and
    the slowest of a hundred is the one that met a stall of the machine: 0.2 s where eight processes want two cores.
    """
    assert quantile(seconds, 0.5) <= 0.05
    assert quantile(seconds, 0.99) <= 0.3 + late_s


def check_books(server: Served, run: Overload) -> None:
    """Every call had one answer, every item one outcome, and nothing is held (A-27)."""
    assert server.answers() == sum(server.answers(status) for status in (200, 503, 504))
    assert server.items("ok") == server.answers(200)
    assert server.items("deadline_exceeded") == server.answers(504)
    refused = Counter(reply.code for reply in run.replies if reply.status == 503)
    assert refused == {"overloaded": server.answers(503)}
    assert server.items("overloaded") == 0  # all were turned away before they were items
    assert not any(server.gauges().values())


def check_loop(lag: Lag) -> None:
    """20 ms at the 99th percentile and 100 ms at most, beyond what a thread that only sleeps is late here (A-29)."""
    assert len(lag.loop) > 500
    assert quantile(lag.loop, 0.99) <= 0.020 + 2 * quantile(lag.thread, 0.99)
    assert max(lag.loop) <= 0.100 + 2 * max(lag.thread)


def test_a_loop_that_is_blocked_is_seen() -> None:
    """The control of `check_loop`."""
    lag = Lag()

    async def blocking(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(8):
            time.sleep(0.25)
            await asyncio.sleep(0)

    async def ask() -> None:
        probe: Any = LoopProbe(blocking, lag)
        for _ in range(500):
            lag.loop.append(0.0)
        await probe({}, None, None)
        await asyncio.sleep(0.02)
        probe._task.cancel()

    with thread_probe(lag):
        asyncio.run(ask())
    with pytest.raises(AssertionError):
        check_loop(lag)


def test_without_a_bound_goodput_collapses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counter[str]
) -> None:
    """The control: the same server, queue without end: whoever is served has waited too long already."""
    monkeypatch.setattr(CostModel, "time_in_batch_ms", lambda *_: 0.0)  # else what would be late is not begun
    SlowDevice(monkeypatch, encode_s=0.01, step_s=0.04)
    options, settings = limits(ENDLESS)
    with served(tmp_path, tiny.prompt("a", decoding=GREEDY), options=options, settings=settings) as server:
        run = overload(server, 4.0, counted, 1)
    assert run.goodput < 0.7, run.goodput
    assert run.deepest > CAP
