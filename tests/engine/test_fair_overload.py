"""Overload and hogs, simulated on a virtual clock: an engine that takes 10 ms for a batch of up to eight."""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import Protocol

import pytest

from promptmux_server.engine.scheduler import FairQueue, QueueLimits, Share
from promptmux_server.errors import PromptmuxError

BATCH, BATCH_S, DEADLINE_S = 8, 0.010, 1.0
CAPACITY = BATCH / BATCH_S
"""Requests a second."""
LIMITS = QueueLimits(256, 64, 128)


@dataclass(frozen=True, eq=False)
class Asked:
    """A request of the simulation."""

    key: str
    arrived: float


class Policy(Protocol):
    """A queue under test."""

    def put(self, asked: Asked) -> bool: ...

    def take(self, now: float) -> list[Asked]: ...

    def __len__(self) -> int: ...


class Fair:
    """Ours: what is late leaves before it costs anything."""

    def __init__(self) -> None:
        self.queue: FairQueue[Asked] = FairQueue(LIMITS, {}, random.Random(1))
        self.retry_after: set[int | None] = set()

    def put(self, asked: Asked) -> bool:
        try:
            self.queue.put(asked, Share(asked.key, "task"), 1.25, asked.arrived + DEADLINE_S)
        except PromptmuxError as error:
            self.retry_after.add(error.retry_after_s)
            return False
        return True

    def take(self, now: float) -> list[Asked]:
        self.queue.expire(now)
        return self.queue.take(BATCH, math.inf, lambda _: True)

    def __len__(self) -> int:
        return len(self.queue)


class FirstInFirstOut:
    """The controls: the same engine behind a plain queue."""

    def __init__(self, capacity: float) -> None:
        self.waiting, self.capacity = deque[Asked](), capacity

    def put(self, asked: Asked) -> bool:
        if len(self.waiting) >= self.capacity:
            return False
        self.waiting.append(asked)
        return True

    def take(self, now: float) -> list[Asked]:
        return [self.waiting.popleft() for _ in range(min(BATCH, len(self.waiting)))]

    def __len__(self) -> int:
        return len(self.waiting)


@dataclass
class Outcome:
    """What came of a run, by key."""

    seconds: float
    offered: Counter[str]
    good: Counter[str]
    latencies: dict[str, list[float]]
    deepest: int

    @property
    def goodput(self) -> float:
        """Answers in time, as a part of what the engine can do."""
        return self.good.total() / (CAPACITY * self.seconds)

    def success(self, key: str) -> float:
        return self.good[key] / self.offered[key]

    def p99_s(self, key: str) -> float:
        found = sorted(self.latencies[key])
        return found[int(0.99 * len(found))]


def run(policy: Policy, loads: dict[str, float], seconds: float) -> Outcome:
    """Poisson arrivals at `loads` times the capacity for each key, until `seconds`."""
    chance = random.Random(11)
    arrivals = [(chance.expovariate(load * CAPACITY), key) for key, load in loads.items()]
    heapq.heapify(arrivals)
    outcome = Outcome(seconds, Counter(), Counter(), {key: [] for key in loads}, 0)
    now = 0.0
    while now < seconds:
        while arrivals[0][0] <= now:
            arrived, key = arrivals[0]
            heapq.heapreplace(arrivals, (arrived + chance.expovariate(loads[key] * CAPACITY), key))
            outcome.offered[key] += 1
            policy.put(Asked(key, arrived))
        outcome.deepest = max(outcome.deepest, len(policy))
        batch = policy.take(now)
        now = now + BATCH_S if batch else arrivals[0][0]
        for asked in batch:
            outcome.latencies[asked.key].append(now - asked.arrived)
            outcome.good[asked.key] += now - asked.arrived <= DEADLINE_S
    return outcome


@pytest.mark.parametrize(("load", "seconds"), [(4.0, 20.0), (10.0, 8.0)])
def test_overload_costs_no_goodput(load: float, seconds: float) -> None:
    policy = Fair()
    outcome = run(policy, {f"k{key}": load / 5 for key in range(5)}, seconds)
    assert outcome.goodput >= 0.90
    assert outcome.deepest <= LIMITS.total
    assert policy.retry_after <= set(range(1, 31))
    assert len(policy.retry_after) > 1
    assert all(outcome.p99_s(key) <= DEADLINE_S for key in outcome.latencies)


def test_without_a_bound_goodput_collapses() -> None:
    assert run(FirstInFirstOut(math.inf), {"a": 4.0}, 20.0).goodput < 0.10


def test_a_hog_does_not_touch_its_neighbour() -> None:
    solo = run(Fair(), {"victim": 0.1}, 20.0)
    outcome = run(Fair(), {"hog": 3.9, "victim": 0.1}, 20.0)
    assert outcome.success("victim") >= 0.99
    assert outcome.p99_s("victim") <= 2 * solo.p99_s("victim") + BATCH_S
    assert outcome.goodput >= 0.95


def test_first_in_first_out_turns_the_neighbour_away() -> None:
    assert run(FirstInFirstOut(LIMITS.total), {"hog": 3.9, "victim": 0.1}, 20.0).success("victim") < 0.5


def test_one_caller_alone_gets_the_whole_device() -> None:
    assert run(Fair(), {"only": 1.5}, 10.0).goodput >= 0.95


def test_a_victim_is_served_ahead_of_what_a_hog_has_queued() -> None:
    hog, late = [Asked("hog", 0.0) for _ in range(60)], Asked("victim", 0.0)
    for policy, ahead in [(Fair(), True), (FirstInFirstOut(256), False)]:
        for asked in [*hog, late]:
            assert policy.put(asked)
        assert (late in policy.take(0.0)) == ahead
