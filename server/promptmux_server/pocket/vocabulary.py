"""The BPE vocabulary of `pocket`, learnt from texts about scenes.

`python -m promptmux_server.pocket.vocabulary --help`
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from promptmux_server.backbone.tokenizer import train_tokenizer
from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.recipe import NUM_BINS
from promptmux_server.pocket.samples import corpus

MAX_SIZE = 1100
SCENES = 10_000
SEED = 7
REPEATS = 40
"""How often each kind's forms are added, so that the names of held-out kinds are single tokens as well."""


def kind_forms() -> Iterator[str]:
    for kind in KINDS.values():
        for form in (kind.with_article, kind.name, kind.plural):
            yield from [f" {form}"] * REPEATS


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn the tokenizer of the embedded backbone.")
    parser.add_argument("--data", type=Path, default=Path("var/pocket/train"))
    parser.add_argument("--out", type=Path, default=Path("var/pocket/tokenizer"))
    arguments = parser.parse_args()
    data = SceneDataset(arguments.data)
    texts = [*corpus((data[i][1] for i in range(SCENES)), random.Random(SEED)), *kind_forms()]
    tokenizer = train_tokenizer(texts, MAX_SIZE, num_bins=NUM_BINS)
    tokenizer.save(arguments.out)
    print(f"{arguments.out}: {tokenizer.text_vocab_size} entries")


if __name__ == "__main__":
    main()
