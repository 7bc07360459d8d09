"""The BPE vocabulary of `pocket`, learnt from texts about scenes.

`python -m promptmux_server.pocket.vocabulary --help`
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from promptmux_server.backbone.tokenizer import SPECIALS, Tokenizer, train_tokenizer
from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.recipe import NUM_BINS
from promptmux_server.pocket.samples import ANSWER_WORDS, pretrain_samples
from promptmux_server.pocket.scenes import Scene
from promptmux_server.pocket.tasks import TASKS

MAX_SIZE = 1100
SCENES = 10_000
SEED = 7
REPEATS = 40
"""How often each kind's forms are added, so that the names of held-out kinds are single tokens as well."""


def word_forms() -> Iterator[str]:
    for kind in KINDS.values():
        for form in (kind.with_article, kind.plural):
            yield from [f" {form}"] * REPEATS
    for word in ANSWER_WORDS:  # kinds among them
        yield from [f" {word}"] * REPEATS


def corpus(scenes: Iterable[Scene], rng: random.Random) -> Iterator[str]:
    """All texts about scenes."""
    for scene in scenes:
        for sample in pretrain_samples(scene, rng, 6, described=True):
            yield from (part for part in (*sample.source, *sample.target) if isinstance(part, str))
        for task in TASKS.values():
            if item := task.sample(scene, rng):
                yield task.instruction.format(text=item.text)
                if isinstance(item.target, str):
                    yield f" {item.target}"


def carried_over(rows: Tensor, old: Tokenizer, new: Tokenizer) -> Tensor:
    """Embeddings (V, d) of one vocabulary's symbols for another's.

    A text's are the mean of its pieces', and where those are several, a direction of its own besides: means of letters
    are all much alike, and what is alike is learned apart only by what brings it out (docs/log.md).
    """
    generator = torch.Generator().manual_seed(SEED)
    texts = [new.decode([token]) for token in range(len(SPECIALS), new.text_vocab_size)]
    begun = [rows[: len(SPECIALS)]]
    for pieces in map(old.encode, texts):
        own = torch.randn(1, rows.shape[1], generator=generator) * rows.std() if len(pieces) > 1 else 0.0
        begun.append(rows[torch.tensor(pieces)].mean(0, keepdim=True) + own)
    return torch.cat([*begun, rows[old.first_bin_id :]])


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn the tokenizer of the embedded backbone.")
    parser.add_argument("--data", type=Path, default=Path("var/pocket/train"))
    parser.add_argument("--out", type=Path, default=Path("var/pocket/tokenizer"))
    arguments = parser.parse_args()
    data = SceneDataset(arguments.data)
    texts = [*corpus((data[i][1] for i in range(SCENES)), random.Random(SEED)), *word_forms()]
    tokenizer = train_tokenizer(texts, MAX_SIZE, num_bins=NUM_BINS)
    tokenizer.save(arguments.out)
    print(f"{arguments.out}: {tokenizer.text_vocab_size} entries")


if __name__ == "__main__":
    main()
