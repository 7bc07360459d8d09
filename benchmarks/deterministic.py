"""What deterministic mode costs: 64 requests over 64 tasks with and without it.

In deterministic mode every request is alone in its products, so that its answer is the same bits whatever the load.
"""

from __future__ import annotations

from engines import answer_all, arguments, bench, report, side_by_side
from promptmux_server.engine.request import Request

REQUESTS = 64


def main() -> None:
    options = arguments(__doc__, rounds=3)
    with bench(options.backbone, REQUESTS) as made, made.engine() as shared, made.engine(deterministic=True) as alone:
        pictures = [made.picture(i) for i in range(REQUESTS)]

        def requests() -> list[Request]:
            return [made.request(i, picture) for i, picture in enumerate(pictures)]

        ways = {"shared": lambda: answer_all(shared, requests()), "alone": lambda: answer_all(alone, requests())}
        seconds = side_by_side(ways, options.rounds)
        report(
            "deterministic",
            options.backbone,
            requests_per_s=REQUESTS / seconds["shared"],
            deterministic_requests_per_s=REQUESTS / seconds["alone"],
            of_shared=seconds["shared"] / seconds["alone"],
        )


if __name__ == "__main__":
    main()
