"""Deadlines from 1 ms to 2 s on a slow device: whoever is late is told in time, and no work starts after it (A-15)."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

import tiny
from api.live_server import until
from load.callers import crowd
from load.served import SlowDevice, served
from promptmux_server.engine.cost_model import CostModel
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.prompt_versions import PromptSource
from promptmux_server.engine.request import Answer, Request
from promptmux_server.engine.scheduler import FairQueue
from promptmux_server.engine.ticket import Ticket
from promptmux_server.errors import DeadlineExceeded
from promptmux_server.settings import Settings

OPTIONS = EngineOptions(max_batch=4, queue_size=1000, queue_per_key=1000, queue_per_task=1000)
GREEDY = {"method": "greedy", "min_length": 2, "max_length": 2}
LATE_S = 0.05
BUSY_S = 0.25
"""What the promise is given on top: other processes want the same two cores."""


@pytest.fixture
def late_starts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """By how much the deadlines had passed of requests that the device began with."""
    late: list[float] = []
    encode = Engine._encode

    def count(self: Engine, tickets: Sequence[Ticket]) -> None:
        late.extend(time.monotonic() - ticket.request.deadline for ticket in tickets)
        encode(self, tickets)

    monkeypatch.setattr(Engine, "_encode", count)
    return late


def deadlines_ms(count: int) -> list[int]:
    """Even on a logarithmic scale from 1 ms to 2 s."""
    chance = random.Random(3)
    return [max(1, round(2000 ** chance.random())) for _ in range(count)]


def requests(count: int) -> list[tuple[float, Request]]:
    """(seconds until its deadline, request)"""
    found = []
    for deadline_ms in deadlines_ms(count):
        seconds = deadline_ms / 1000
        request = Request(request_id="r", task="a", text="the dog", deadline=time.monotonic() + seconds)
        found.append((seconds, request))
    return found


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    tiny.write(tmp_path, tiny.prompt("a", image_size=None, decoding=GREEDY), tiny.prompt("b", seed=1, image_size=None))
    engine = tiny.engine(tmp_path, OPTIONS)
    engine.start()
    yield engine
    engine.stop(2.0)


def submitted(engine: Engine, count: int) -> list[tuple[float, Future[Answer], list[float]]]:
    """Requests all at once; of each when it was due to be told at the earliest, and when its future ended.

    Submitting hundreds takes longer than the shortest deadlines: nobody can be told of one before the engine knows it.
    """
    found = []
    for _, request in requests(count):
        ended: list[float] = []
        future = engine.submit(request)
        due = max(request.deadline, time.monotonic())
        future.add_done_callback(lambda _, ended=ended: ended.append(time.monotonic()))
        found.append((due, future, ended))
    return found


def test_the_engine_tells_whoever_is_late_within_a_step_and_starts_nothing_late(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, late_starts: list[float]
) -> None:
    device = SlowDevice(monkeypatch, encode_s=0.005, step_s=0.02)
    asked = submitted(engine, 300)
    wait([future for _, future, _ in asked], timeout=30)
    until(lambda: all(ended for *_, ended in asked))
    outcomes = Counter(type(future.exception()) for _, future, _ in asked)
    assert set(outcomes) == {type(None), DeadlineExceeded}
    assert min(outcomes.values()) > 30
    for due, future, (ended,) in asked:
        if future.exception() is not None:
            # As early as it is known that two steps, with others joining, will not fit any more.
            assert due - 3 * device.turn_s(4) - BUSY_S <= ended <= due + LATE_S + device.turn_s(4) + BUSY_S
    assert max(late_starts) <= LATE_S  # between a turn's look at the clock and its first pass
    assert device.encoded == len(late_starts) < 300
    until(lambda: engine.load().running == 0)
    assert (engine.load().waiting, engine.load().memory.slots_used) == (0, 0)


def wasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """Of the answers begun by an overloaded engine, the part that was late: each takes eight steps of 20 ms."""
    long = GREEDY | {"min_length": 8, "max_length": 8}
    tiny.write(tmp_path, tiny.prompt("a", image_size=None, decoding=long))
    engine = tiny.engine(tmp_path, OPTIONS)
    engine.start()
    device = SlowDevice(monkeypatch, encode_s=0.005, step_s=0.02)
    begun = []
    for deadline_s in [0.4, 0.6, 0.8] * 60:
        begun.append(
            engine.submit(Request(request_id="r", task="a", text="the dog", deadline=time.monotonic() + deadline_s))
        )
        time.sleep(0.01)  # four fifths of a batch's answers arrive while it computes one
    wait(begun, timeout=30)
    engine.stop(2.0)
    return 1.0 - sum(future.exception() is None for future in begun) / device.encoded


def test_what_would_be_late_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wasted(tmp_path, monkeypatch) < 0.25


def test_what_is_begun_until_its_deadline_is_mostly_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(CostModel, "time_in_batch_ms", lambda *_: 0.0)
    assert wasted(tmp_path, monkeypatch) > 0.5


def test_a_queue_that_forgets_deadlines_starts_late_work(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, late_starts: list[float]
) -> None:
    """The control."""
    SlowDevice(monkeypatch, encode_s=0.005, step_s=0.02)
    monkeypatch.setattr(FairQueue, "expire", lambda *_: [])
    asked = submitted(engine, 60)
    wait([future for _, future, _ in asked], timeout=30)
    assert max(late_starts) > LATE_S


def test_a_request_that_waits_for_its_prompt_is_told_in_time_though_the_engine_sleeps(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle engine looks at its queue twice a second; who is late must not wait for that."""
    go_on, read = threading.Event(), engine._loader._read

    def slow(source: PromptSource) -> Any:
        assert go_on.wait(30)
        return read(source)

    monkeypatch.setattr(engine._loader, "_read", slow)
    engine._tiers._host.drop(next(s.sha256 for s in engine.tasks() if s.name == "b" and s.sha256))
    asked = []
    for _ in range(5):
        ended: list[float] = []
        request = Request(request_id="r", task="b", text="the dog", deadline=time.monotonic() + 0.05)
        future = engine.submit(request)
        future.add_done_callback(lambda _, ended=ended: ended.append(time.monotonic()))
        assert isinstance(future.exception(10), DeadlineExceeded)
        asked.append(ended[0] - request.deadline)
    go_on.set()
    assert sorted(asked)[2] <= LATE_S, asked


def test_over_http_answers_come_by_the_deadline_and_every_reason_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_starts: list[float]
) -> None:
    device = SlowDevice(monkeypatch, encode_s=0.01, step_s=0.03)
    prompt = tiny.prompt("a", image_size=None, decoding=GREEDY)
    bodies = [{"task": "a", "text": "the dog", "deadline_ms": ms} for ms in deadlines_ms(200)]
    settings = Settings(queue_size=1000)
    with served(tmp_path, prompt, options=OPTIONS, settings=settings) as server:
        crowd(server.port, [{"task": "a", "text": "the dog"}], 0.3, seed=1, clients=1)
        ok, encoded = server.items("ok"), device.encoded
        late_starts.clear()
        replies = crowd(server.port, bodies, 4.0, seed=2, rate=60.0)
        until(server.is_idle)
        statuses = Counter(reply.status for reply in replies)
        assert set(statuses) == {200, 504}
        for reply in replies:
            seconds = reply.sent["deadline_ms"] / 1000
            assert reply.seconds <= seconds + LATE_S + device.turn_s(4) + 4 * BUSY_S
            assert reply.status == 200 or reply.seconds >= seconds
        assert server.items("ok") - ok == statuses[200]
        assert server.items("deadline_exceeded") == server.answers(504) == statuses[504]
        assert server.answers() == server.items("ok") + server.items("deadline_exceeded")
        assert statuses[200] <= device.encoded - encoded < len(replies)
        assert max(late_starts) <= LATE_S
