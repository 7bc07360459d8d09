"""Four times the load that the engine can carry: what it still answers in time, and what a small caller gets.

Capacity C is measured with more requests in flight than the batch holds; the deadline is 5 times the 99th percentile of
requests that are alone. Then 4 C arrive at random:

- `goodput`: answers within their deadline, a second, of C. Target 0.90. Without a bound on the queue for comparison.
- `victim`: part of the requests in time of a key that sends 0.1 C while another sends 3.9 C. Target 0.99. The same
  load under one key shows what it would get of a queue that is not fair.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice

from engines import Bench, arguments, bench, report
from load import Call, answered_per_s, closed_loop, open_loop, percentile, poisson
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.request import Request

TASKS = 16
PICTURES = 512
"""More than wait and run at one time: two that ask about one picture would share its stem."""
OVERLOAD, VICTIM = 4.0, 0.1
"""What is offered in all, and by the small caller, as parts of the capacity."""
SAMPLE = 60
"""Requests for a 99th percentile."""
WARM_S = 3.0
"""Not counted at the start of a load: until the first batch is done there are no answers."""
DEADLINE = 5.0
"""Times the 99th percentile of a request that is alone."""


def endless(made: Bench) -> Iterator[Request]:
    pictures = [made.picture(seed) for seed in range(PICTURES)]
    return (made.request(i % TASKS, pictures[i % PICTURES]) for i in count())


def capacity(engine: Engine, requests: Iterator[Request], seconds: float, in_flight: int) -> float:
    """Answers a second while always so many requests are on their way."""
    begun = time.monotonic()
    stop = begun + WARM_S + seconds

    def until_stop() -> Iterator[Request]:
        while time.monotonic() < stop:
            yield next(requests)

    calls = closed_loop(engine, until_stop(), in_flight)
    return answered_per_s(calls, begun + WARM_S, stop)


def timeline(requests: Iterator[Request], rates: dict[str, float], seconds: float) -> list[tuple[float, Request]]:
    """Requests of each key at random times, so many a second."""
    arrivals = [
        (at_s, key)
        for seed, (key, rate) in enumerate(rates.items())
        for at_s in poisson(rate, round(rate * seconds), seed)
    ]
    return [(at_s, replace(next(requests), key=key)) for at_s, key in sorted(arrivals)]


def answered(
    engine: Engine, load: Sequence[tuple[float, Request]], deadline_s: float, load_s: float
) -> tuple[float, list[Call]]:
    """Answers a second while the load lasts, and all calls."""
    begun = time.monotonic()
    calls = open_loop(engine, load, deadline_s)
    return answered_per_s(calls, begun + WARM_S, begun + load_s), calls


def share_in_time(calls: Sequence[Call]) -> float:
    return sum(call.in_time for call in calls) / len(calls)


def outcomes(calls: Sequence[Call]) -> dict[str, int]:
    return dict(Counter("answered" if call.in_time else call.error or "answered late" for call in calls))


def main() -> None:
    options = arguments(__doc__, seconds=20, batch=4)
    seconds, load_s = float(options.seconds), WARM_S + options.seconds
    with bench(options.backbone, TASKS) as made:
        requests = endless(made)
        with made.engine(max_batch=options.batch) as engine:
            capacity(engine, requests, 1.0, 2 * options.batch)  # warms up, and teaches what requests cost
            full = capacity(engine, requests, seconds, 2 * options.batch)
            alone = closed_loop(engine, islice(requests, SAMPLE), 1)
            crowded = closed_loop(engine, islice(requests, SAMPLE), options.batch)
        quiet_s = percentile([call.wait_s for call in alone], 99)
        deadline_s = DEADLINE * quiet_s
        load = timeline(requests, {"": OVERLOAD * full}, load_s)
        # Who waits behind a full queue must still be answered in time, at the pace of a full batch.
        crowded_s = percentile([call.wait_s for call in crowded], 99)
        queue = max(1, int(full * (deadline_s - crowded_s)))
        with made.engine(max_batch=options.batch) as engine:
            unbounded, _ = answered(engine, load, deadline_s, load_s)
        with made.engine(max_batch=options.batch, queue_size=queue) as engine:
            goodput, calls = answered(engine, load, deadline_s, load_s)
        with made.engine(max_batch=options.batch, queue_size=2 * queue, queue_per_key=queue) as engine:
            rates = {"hog": (OVERLOAD - VICTIM) * full, "victim": VICTIM * full}
            shared = timeline(requests, rates, load_s)
            fair = open_loop(engine, shared, deadline_s)
            one_key = open_loop(engine, [(at_s, replace(request, key="one")) for at_s, request in shared], deadline_s)
        with made.engine(max_batch=options.batch) as engine:
            after = capacity(engine, requests, seconds, 2 * options.batch)
        victims = [call for call in fair if call.request.key == "victim"]
        marked = [call for call, (_, request) in zip(one_key, shared, strict=True) if request.key == "victim"]
        report(
            "overload",
            options.backbone,
            capacity_per_s=full,
            capacity_afterwards=after / full,  # far from 1: the machine was not quiet, and nothing here means much
            quiet_p99_ms=1000 * quiet_s,
            deadline_ms=1000 * deadline_s,
            crowded_p99_ms=1000 * crowded_s,
            queue_size=queue,
            goodput=goodput / full,
            goodput_without_bound=unbounded / full,
            answered_p99_ms=1000 * percentile([call.wait_s for call in calls if call.error is None], 99),
            refusal_p99_ms=1000 * percentile([c.refused_after_s for c in calls if c.refused_after_s is not None], 99),
            outcomes=outcomes(calls),
            victim=share_in_time(victims),
            victim_outcomes=outcomes(victims),
            victim_under_one_key=share_in_time(marked),
        )


if __name__ == "__main__":
    main()
