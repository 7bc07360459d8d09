"""64 requests over 64 tasks against 64 requests of one task, and against serving one task at a time.

One task at a time is how a server works that holds one adapter active: it groups by task, so 64 tasks are 64 batches.
"""

from __future__ import annotations

from engines import CAPTION_TOKENS, answer_all, arguments, bench, report, side_by_side

REQUESTS = 64


def main() -> None:
    options = arguments(__doc__, rounds=3)
    with bench(options.backbone, REQUESTS) as made, made.engine() as engine:
        pictures = [made.picture(i) for i in range(REQUESTS)]
        # All of one length: of unlike requests the fair queue would let other ones go first in each way.
        length = CAPTION_TOKENS
        mixed = lambda: answer_all(engine, [made.request(i, p, length) for i, p in enumerate(pictures)])  # noqa: E731
        single = lambda: answer_all(engine, [made.request(0, p, length) for p in pictures])  # noqa: E731

        def one_at_a_time() -> None:
            for i, picture in enumerate(pictures):
                answer_all(engine, [made.request(i, picture, length)])

        seconds = side_by_side({"mixed": mixed, "single": single, "one_at_a_time": one_at_a_time}, options.rounds)
        report(
            "mixing",
            options.backbone,
            requests_per_s=REQUESTS / seconds["mixed"],
            of_single_task=seconds["single"] / seconds["mixed"],
            over_one_at_a_time=seconds["one_at_a_time"] / seconds["mixed"],
            costs=dict(engine.load().cost_errors),
        )


if __name__ == "__main__":
    main()
