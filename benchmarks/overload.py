"""Four times the load that the engine can carry: what it still answers in time, and what a small caller gets.

Capacity C is measured with more requests in flight than the batch holds; the deadline is 5 times the 99th percentile of
requests that are alone. Then 4 C arrive at random:

- `goodput`: answers within their deadline, a second, of C. Target 0.90.
- `victim`: part of the requests in time of a key that sends 0.1 C while another sends 3.9 C. Target 0.99. The same
  load under one key shows what it would get of a queue that is not fair.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

from engines import Bench, arguments, bench, report
from load import Call, answered_per_s, closed_loop, open_loop, percentile, poisson
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.request import Request

TASKS = 16
PICTURES = 512
"""More than wait and run at one time: two that ask about one picture would share its stem."""
OVERLOAD, VICTIM = 4.0, 0.1
"""What is offered in all, and by the small caller, as parts of the capacity."""
QUIET = 20
WARM_S = 3.0
"""Not counted at the start of a load: until the first batch is done there are no answers."""
DEADLINE = 5.0


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


def in_time(calls: Sequence[Call]) -> float:
    """Part of the calls that were answered; past its deadline none is."""
    return sum(call.error is None for call in calls) / len(calls)


def main() -> None:
    options = arguments(__doc__, seconds=20, batch=8)
    seconds, load_s = float(options.seconds), WARM_S + options.seconds
    with bench(options.backbone, TASKS) as made:
        requests = endless(made)
        with made.engine(max_batch=options.batch) as engine:
            capacity(engine, requests, 0.0, 2 * options.batch)  # warms up, and teaches what requests cost
            full = capacity(engine, requests, seconds, 2 * options.batch)
            alone = closed_loop(engine, (next(requests) for _ in range(QUIET)), 1)
        quiet_s = percentile([call.wait_s for call in alone], 99)
        deadline_s = DEADLINE * quiet_s
        # A full queue must be served before the deadlines in it pass, the batch that runs first included.
        queue = max(1, int(full * deadline_s / 2) - options.batch)
        with made.engine(max_batch=options.batch, queue_size=queue, queue_per_key=max(1, queue // 2)) as engine:
            capacity(engine, requests, 0.0, queue)
            begun = time.monotonic()
            calls = open_loop(engine, timeline(requests, {"": OVERLOAD * full}, load_s), deadline_s)
            goodput = answered_per_s(calls, begun + WARM_S, begun + load_s)
            rates = {"hog": (OVERLOAD - VICTIM) * full, "victim": VICTIM * full}
            shared = timeline(requests, rates, load_s)
            fair = open_loop(engine, shared, deadline_s)
            one_key = open_loop(engine, [(at_s, replace(request, key="one")) for at_s, request in shared], deadline_s)
        victims = [call for call in fair if call.request.key == "victim"]
        marked = [call for call, (_, request) in zip(one_key, shared, strict=True) if request.key == "victim"]
        report(
            "overload",
            options.backbone,
            capacity_per_s=full,
            quiet_p99_ms=1000 * quiet_s,
            deadline_ms=1000 * deadline_s,
            queue_size=queue,
            goodput=goodput / full,
            answered_p99_ms=1000 * percentile([call.wait_s for call in calls if call.error is None], 99),
            refusal_p99_ms=1000 * percentile([c.refused_after_s for c in calls if c.refused_after_s is not None], 99),
            outcomes=dict(Counter(call.error or "answered" for call in calls)),
            victim=in_time(victims),
            victim_requests=len(victims),
            victim_under_one_key=in_time(marked),
        )


if __name__ == "__main__":
    main()
