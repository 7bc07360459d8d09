"""Timing that notices neighbours: a sample counts only while other processes left the machine alone.

Owns no workload. Foreign CPU time is the machine's busy time (/proc/stat) less our own; without it every
sample counts as clean.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

FOREIGN_SHARE = 0.06
"""Of one core, over a sample; medians of clean samples then repeat within 3 %."""

SLACK_S = 0.02
"""/proc/stat counts in ticks of 10 ms on each of two cores."""


@dataclass(frozen=True)
class Timing:
    """Median seconds of `samples` samples; `clean` is False if the machine was busy in so many that all were used."""

    seconds: float
    samples: int
    clean: bool


def measure(call: Callable[[], object], *, samples: int = 5, limit_s: float = 60.0) -> Timing:
    """Call until `samples` clean samples are there or the time is over, after one call to warm up."""
    call()
    end = time.monotonic() + limit_s

    def calls() -> Iterable[Callable[[], object]]:
        while time.monotonic() < end:
            yield call

    return sample(calls(), samples)


def sample(calls: Iterable[Callable[[], object]], samples: int) -> Timing:
    """Time calls that may differ (the steps of one search), each a sample, until enough were clean."""
    clean: list[float] = []
    every: list[float] = []
    for call in calls:
        busy, own, began = _busy_s(), _own_s(), time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        foreign = (_busy_s() - busy) - (_own_s() - own)
        every.append(seconds)
        if foreign <= FOREIGN_SHARE * seconds + SLACK_S:
            clean.append(seconds)
        if len(clean) >= samples:
            break
    enough = len(clean) >= min(3, samples)
    used = clean if enough else every
    return Timing(statistics.median(used), len(used), enough)


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _busy_s(stat: Path = Path("/proc/stat")) -> float:
    """CPU seconds of all processes since boot, all cores together; our own where the system does not say."""
    try:
        fields = stat.read_text().split(maxsplit=9)
    except OSError:
        return _own_s()
    user, nice, system, _idle, _wait, irq, soft_irq = map(int, fields[1:8])
    return float(user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")
