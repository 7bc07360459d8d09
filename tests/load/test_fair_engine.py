"""A hog beside a victim on the real engine, by the name of their keys (A-17)."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from api.live_server import until
from load.served import SlowDevice, quantile
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.prompt_table import pool_bytes
from promptmux_server.engine.prompt_tiers import PATIENCE
from promptmux_server.engine.request import Answer, Priority, Request
from promptmux_server.engine.ticket import Ticket
from promptmux_server.errors import Overloaded, TenantQueueFull

BATCH = 8
STEPS = 2
SHORT = {"method": "greedy", "min_length": STEPS, "max_length": STEPS}
BUSY_S = 0.4
"""What a promise in time is given on top: other processes want the same two cores."""

Start = Callable[..., Engine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        prompts = [tiny.prompt(name, seed=seed, image_size=None, decoding=SHORT) for seed, name in enumerate("ab")]
        tiny.write(tmp_path, *prompts)
        chosen = EngineOptions(**{"max_batch": BATCH, "queue_size": 64, "queue_per_key": 32, **options})
        engine = tiny.engine(tmp_path, chosen)
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop(2.0)


def ask(key: str = "", task: str = "a", priority: Priority = "interactive") -> Request:
    deadline = time.monotonic() + 30
    return Request(request_id="r", task=task, text="the dog", deadline=deadline, key=key, priority=priority)


@dataclass
class Tally:
    """What came of one caller's requests."""

    offered: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of those answered."""

    @property
    def success(self) -> float:
        return len(self.seconds) / self.offered


def offer(engine: Engine, loads: Mapping[str, tuple[float, Request]], seconds: float) -> dict[str, Tally]:
    """Poisson arrivals: name -> (requests a second, what is asked)."""
    chance, start = random.Random(5), time.monotonic()
    arrivals = sorted((due, name) for name, (rate, _) in loads.items() for due in _poisson(chance, rate, seconds))
    tallies = {name: Tally() for name in loads}
    futures: list[Future[Answer]] = []
    for due, name in arrivals:
        time.sleep(max(0.0, start + due - time.monotonic()))
        tally, began, template = tallies[name], time.monotonic(), loads[name][1]
        tally.offered += 1
        try:
            future = engine.submit(ask(template.key, template.task, template.priority))
        except (Overloaded, TenantQueueFull):
            continue
        future.add_done_callback(lambda f, t=tally, b=began: f.exception() or t.seconds.append(time.monotonic() - b))
        futures.append(future)
    wait(futures, timeout=30)
    until(lambda: engine.load().running == 0)
    return tallies


def _poisson(chance: random.Random, rate: float, seconds: float) -> Iterator[float]:
    due = chance.expovariate(rate)
    while due < seconds:
        yield due
        due += chance.expovariate(rate)


@dataclass(frozen=True)
class Rate:
    """Answers for each second of the clock, and for each that the device worked."""

    by_clock: float
    by_device: float


def throughput(engine: Engine, device: SlowDevice, keys: Sequence[str], seconds: float) -> Rate:
    """Of these callers, who together always have two batches waiting or running."""
    begun, worked = time.monotonic(), device.busy_s
    submitted = 0
    waiting: set[Future[Answer]] = set()
    while time.monotonic() - begun < seconds:
        while len(waiting) < 2 * BATCH:
            waiting.add(engine.submit(ask(keys[submitted % len(keys)])))
            submitted += 1
        waiting = wait(waiting, timeout=1, return_when="FIRST_COMPLETED").not_done
    wait(waiting, timeout=30)
    until(lambda: engine.load().running == 0)
    return Rate(submitted / (time.monotonic() - begun), submitted / (device.busy_s - worked))


@dataclass(frozen=True)
class Contest:
    """A victim of a tenth of the capacity, alone and beside a hog of 3.9 times the capacity."""

    alone: Tally
    beside: Tally
    used: float
    """Answers for each second that the device worked, as a part of those to one caller who always waits: seconds of the
    clock would tell how busy the machine is as well."""


def contest(engine: Engine, device: SlowDevice, hog: str, victim: str, seconds: float) -> Contest:
    throughput(engine, device, ["x"], 0.5)
    best = throughput(engine, device, ["x"], 1.5)
    tenth = (0.1 * best.by_clock, ask(victim))
    alone = offer(engine, {"victim": tenth}, 0.6 * seconds)["victim"]
    worked = device.busy_s
    both = offer(engine, {"hog": (3.9 * best.by_clock, ask(hog)), "victim": tenth}, seconds)
    answered = len(both["hog"].seconds) + len(both["victim"].seconds)
    return Contest(alone, both["victim"], answered / (device.busy_s - worked) / best.by_device)


def test_a_hog_does_not_touch_its_neighbour(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SlowDevice(monkeypatch, encode_s=0.005, step_s=0.02)
    found = contest(start(), device, "hog", "victim", 7.0)
    assert found.beside.offered > 12
    assert found.beside.success >= 0.99
    # One batch: whoever comes waits for a place in it, which is free after the next turn, and for its own passes.
    longest_s = 2 * quantile(found.alone.seconds, 0.99) + 2 * device.turn_s(BATCH) + BUSY_S
    assert quantile(found.beside.seconds, 0.99) <= longest_s
    assert found.used >= 0.95


def test_behind_one_name_the_hog_turns_its_neighbour_away(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: first in, first out."""
    device = SlowDevice(monkeypatch, encode_s=0.005, step_s=0.02)
    assert contest(start(), device, "all", "all", 3.0).beside.success < 0.6


def test_one_caller_alone_gets_the_whole_device(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SlowDevice(monkeypatch, encode_s=0.005, step_s=0.02)
    engine = start()
    alone, many = (throughput(engine, device, keys, 1.5).by_device for keys in (["only"], list("abcd")))
    assert alone >= 0.95 * many
    best = BATCH / (BATCH * device.encode_s + STEPS * device.step_s)
    assert 0.8 * best <= alone <= best  # the rest: the first and the last batch are not full


def test_a_crowd_of_batch_work_hardly_slows_interactive_requests(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SlowDevice(monkeypatch, encode_s=0.005, step_s=0.02)
    engine = start()
    throughput(engine, device, ["x"], 0.5)
    rate = 0.4 * throughput(engine, device, ["x"], 1.5).by_clock
    asking = ask("somebody")
    alone = offer(engine, {"asking": (rate, asking)}, 3.0)["asking"]
    crowd = (4 * rate, ask("jobs", priority="batch"))
    beside = offer(engine, {"asking": (rate, asking), "crowd": crowd}, 3.0)
    assert beside["asking"].success >= 0.99
    assert beside["crowd"].success < 1.0  # the control: there was a crowd
    found, before = quantile(beside["asking"].seconds, 0.99), quantile(alone.seconds, 0.99)
    assert found <= 1.5 * before + device.turn_s(BATCH) + BUSY_S
    same = offer(engine, {"asking": (rate, ask("jobs")), "crowd": (4 * rate, ask("jobs"))}, 3.0)["asking"]
    assert same.success < 0.9 or quantile(same.seconds, 0.99) > found  # the control: without a priority


def test_with_one_place_for_prompts_nobody_is_passed_over(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A, B, A, A, ...: after `PATIENCE` younger requests, a batch of the default size, B's prompt takes the place.

    Steps take 20 ms: in less the thread that moves prompts may not have had its turn before another batch begins.
    """
    SlowDevice(monkeypatch, encode_s=0.0, step_s=0.02)
    batches: list[list[str]] = []
    go, encode = threading.Event(), Engine._encode

    def record(self: Engine, tickets: Sequence[Ticket]) -> None:
        assert go.wait(20)
        batches.append([ticket.request.task for ticket in tickets])
        encode(self, tickets)

    monkeypatch.setattr(Engine, "_encode", record)
    places = pool_bytes(tiny.config(), torch.float32, 1)
    engine = start(prompt_device_bytes=places, max_batch=PATIENCE, queue_size=256, queue_per_key=256)
    futures = [engine.submit(ask("k", task)) for task in ("a", "b", *"a" * 5 * PATIENCE)]
    go.set()
    assert all(future.result(30) for future in futures)
    first_b = next(number for number, tasks in enumerate(batches) if "b" in tasks)
    # Those that were taken before B was looked at, its patience, and a batch while its prompt was on its way.
    assert sum(map(len, batches[:first_b])) <= 3 * PATIENCE, batches
    assert engine.load().prompts.evictions >= 1  # the control: there was one place
