"""Continuous against static batching, answers of 2 to 32 tokens: throughput, and how long a short answer takes.

A static server takes up to a batch of what waits, answers when the last of it is done, and only then takes more. Both
run on one engine. Throughput: all requests are there at once. Waits: the same arrivals at random for both, at 70 % of
what the static server can do. Target: short answers (4 tokens or fewer) in half the time or less.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from engines import arguments, bench, report, side_by_side
from load import Call, closed_loop, ended, open_loop, percentile, poisson, send
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.request import Request

LENGTHS = (2, 32)
SHORT = 4
LOAD = 0.7
TASKS = 16
NO_LIMIT_S = 3600.0

Timeline = Sequence[tuple[float, Request]]


def static(engine: Engine, timeline: Timeline, batch: int) -> list[Call]:
    """Serve requests that arrive at their seconds from now, a batch at a time."""
    begun, coming, calls = time.monotonic(), deque(timeline), []
    while coming:
        time.sleep(max(0.0, begun + coming[0][0] - time.monotonic()))
        now = time.monotonic() - begun
        group: list[Call] = []
        while coming and coming[0][0] <= now and len(group) < batch:
            at_s, request = coming.popleft()
            group.append(send(engine, request, begun + at_s))
        last = max(call.ended for call in ended(group))
        for call in group:
            call.ended = last
        calls += group
    return calls


def short_waits(calls: Sequence[Call]) -> list[float]:
    """Seconds that the short answers took."""
    assert all(call.error is None for call in calls)
    lengths = [(call.request.decoding or {})["max_length"] for call in calls]
    return [
        call.wait_s for call, length in zip(calls, lengths, strict=True) if isinstance(length, int) and length <= SHORT
    ]


def main() -> None:
    options = arguments(__doc__, rounds=2, requests=96, batch=16)
    lengths = np.random.default_rng(0).integers(LENGTHS[0], LENGTHS[1] + 1, options.requests).tolist()
    with bench(options.backbone, TASKS) as made, made.engine(max_batch=options.batch) as engine:
        pictures = [made.picture(i) for i in range(options.requests)]

        def requests() -> list[Request]:
            parts = zip(pictures, lengths, strict=True)
            return [made.request(i % TASKS, picture, length) for i, (picture, length) in enumerate(parts)]

        ways = {
            "static": lambda: static(engine, [(0.0, request) for request in requests()], options.batch),
            "continuous": lambda: closed_loop(engine, requests(), options.batch),
        }
        seconds = side_by_side(ways, options.rounds)
        rate = LOAD * options.requests / seconds["static"]
        timeline = list(zip(poisson(rate, options.requests, seed=1), requests(), strict=True))
        waits = {
            "static": short_waits(static(engine, timeline, options.batch)),
            "continuous": short_waits(open_loop(engine, timeline, NO_LIMIT_S)),
        }
        p50 = {way: percentile(found, 50) for way, found in waits.items()}
        report(
            "continuous",
            options.backbone,
            requests_per_s=options.requests / seconds["continuous"],
            over_static=seconds["static"] / seconds["continuous"],
            load_requests_per_s=rate,
            short_answers=len(waits["static"]),
            short_p50_ms=1000 * p50["continuous"],
            static_short_p50_ms=1000 * p50["static"],
            short_faster=p50["static"] / p50["continuous"],
        )


if __name__ == "__main__":
    main()
