"""16 tasks asked about one picture together, against 16 calls that share nothing.

The picture passes the stem once instead of 16 times, so what it saves is known beforehand: 15 parts in 16 of the time
that the stem takes in the separate calls, which is measured in the same run. Target: within 10 % of that.
"""

from __future__ import annotations

from itertools import count

import torch

from engines import Bench, answer_all, arguments, bench, report, side_by_side
from promptmux_server.backbone.images import DecodedImage, from_array
from promptmux_server.engine.pictures import PICTURES_PER_STEM_PASS

TASKS = 16
CACHE_BYTES = 256 << 20
"""The server's default."""
JOINING_MS = 1e6
"""All 16 join in one pass: by default pictures that cost more than 250 ms would join in smaller ones, each encoder pass
then a smaller product, and the comparison would no longer be about the stem alone."""


def near_copies(picture: DecodedImage, number: int) -> list[DecodedImage]:
    """The same picture but for one pixel each: as much work, and no other's tokens will do."""
    copies = [picture.rgb.copy() for _ in range(number)]
    for index, copy in enumerate(copies):
        copy[0, index] ^= 255
    return [from_array(copy) for copy in copies]


@torch.no_grad()
def see(made: Bench, number: int) -> None:
    """The stem over so many pictures, in passes as the engine makes them."""
    pixels = torch.zeros(number, 3, made.side, made.side)
    for part in pixels.split(PICTURES_PER_STEM_PASS):
        made.model.image_tokens(part)


def main() -> None:
    options = arguments(__doc__, rounds=5)
    with (
        bench(options.backbone, TASKS) as made,
        made.engine(image_cache_bytes=CACHE_BYTES, joining_ms=JOINING_MS) as sharing,
        made.engine(image_cache_bytes=0, joining_ms=JOINING_MS) as separate,
    ):
        seeds = count()  # a picture of its own each time: none may be in the cache from the time before

        def fan_out() -> None:
            picture = made.picture(next(seeds))
            answer_all(sharing, [made.request(task, picture) for task in range(TASKS)])

        def one_by_one() -> None:
            pictures = near_copies(made.picture(next(seeds)), TASKS)
            answer_all(separate, [made.request(task, picture) for task, picture in enumerate(pictures)])

        ways = {"fanout": fan_out, "separate": one_by_one, "stem": lambda: see(made, TASKS)}
        seconds = side_by_side(ways, options.rounds)
        speedup = seconds["separate"] / seconds["fanout"]
        saved_s = seconds["stem"] * (TASKS - 1) / TASKS
        predicted = seconds["separate"] / (seconds["separate"] - saved_s)
        report(
            "fanout",
            options.backbone,
            over_separate=speedup,
            predicted=predicted,
            of_predicted=speedup / predicted,
            stem_of_separate=seconds["stem"] / seconds["separate"],
            separate_s=seconds["separate"],
        )


if __name__ == "__main__":
    main()
