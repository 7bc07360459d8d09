"""Prompt tuning: an epoch against the released way of training, and many runs in one batch against one after another.

An epoch is one from the second on: the released loop passes every picture through the stem again, ours reads what the
stem said the first time. Texts, pictures, prompts, loss and element type are the same in all ways. Peak memory is that
of a process which does nothing else; the released loop is timed under the same allocator.

    python benchmarks/tuning.py --backbone ofa-base --rows 8 --bits 32
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engines import arguments, report, side_by_side
from promptmux_server.backbone.assemble import assemble, serving_dtype
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.sizes import OFA_SIZES
from promptmux_server.backbone.weights import LoadedBackbone, load_backbone
from promptmux_server.backbone.weights.random_init import random_backbone
from promptmux_server.bench.released_tuning import ReleasedTuner
from promptmux_server.pocket import WEIGHTS
from promptmux_server.training.batch import Cursor, TrainingBatch
from promptmux_server.training.cohort import Cohort, train
from promptmux_server.training.forward import Example
from promptmux_server.training.methods import DeepPrompts
from promptmux_server.training.recipe import PromptRecipe, StepRecipe
from promptmux_server.training.run import Run

ONLY = "PROMPTMUX_BENCH_ONLY"
"""Names the one way that a process does, whose peak memory it prints."""


class Workload:
    """`batches` batches of `rows` examples about a picture each, and the ways to learn from them."""

    def __init__(self, backbone: str, *, rows: int, batches: int, length: int, dtype: torch.dtype) -> None:
        self.model, side = load_model(backbone, dtype)
        self.rows, self.length = rows, length
        generator = torch.Generator().manual_seed(1)
        self.pixels = [torch.randn(rows, 3, side, side, generator=generator).to(dtype) for _ in range(batches)]
        rng = random.Random(1)
        self.texts = [[self._example(rng, row) for row in range(rows)] for _ in range(batches)]

    def _example(self, rng: random.Random, row: int) -> Example:
        """A question of 8 to 16 tokens and a text of 4 to 12."""
        words = [
            [rng.randrange(4, self.model.config.text_vocab_size) for _ in range(rng.randint(*n))]
            for n in ((8, 16), (4, 12))
        ]
        return Example((BOS, *words[0], EOS), (BOS,), tuple(words[1]), row)

    @torch.no_grad()
    def seen(self) -> list[list[ImageTokens]]:
        return [self.model.image_tokens(pixels) for pixels in self.pixels]

    def data(self, seen: list[list[ImageTokens]] | None) -> Batches:
        return Batches(self.texts, self.pixels if seen is None else seen)

    def runs(self, count: int, data: Batches) -> list[Run]:
        """As many runs as one epoch takes steps, with rates of their own."""
        recipe = PromptRecipe(encoder_length=self.length, decoder_length=self.length)
        return [
            Run(
                f"run-{i}",
                DeepPrompts(self.model, recipe, seed=i),
                StepRecipe(steps=len(self.texts), learning_rate=0.01 * (i + 1), seed=i),
                data,
            )
            for i in range(count)
        ]

    def together(self, count: int, data: Batches) -> None:
        cohort = Cohort()
        for run in self.runs(count, data):
            cohort.join(run)
        while cohort.runs:
            cohort.advance()

    def one_after_another(self, count: int, data: Batches) -> None:
        for run in self.runs(count, data):
            for _ in train(run):
                pass

    def released(self) -> Callable[[], None]:
        tuner = ReleasedTuner(self.model, self.length)

        def epoch() -> None:
            for pixels, examples in zip(self.pixels, self.texts, strict=True):
                tuner.step(pixels, examples)

        return epoch


class Batches:
    """The workload's batches in their order, over and over."""

    def __init__(self, texts: list[list[Example]], pictures: list[list[ImageTokens]] | list[Tensor]) -> None:
        self._batches = [TrainingBatch(t, list(p)) for t, p in zip(texts, pictures, strict=True)]

    def take(self, cursor: Cursor) -> tuple[TrainingBatch, Cursor]:
        number = cursor if isinstance(cursor, int) else 0
        return self._batches[number % len(self._batches)], number + 1


def load_model(name: str, dtype: torch.dtype) -> tuple[OFA, int]:
    """`pocket`, or an OFA size with random weights; and the side of its pictures."""
    if name == "pocket":
        loaded = load_backbone(WEIGHTS)
        return assemble(loaded, dtype=dtype), loaded.config.image_size
    config = OFA_SIZES[name.removeprefix("ofa-")]
    return assemble(LoadedBackbone(config, random_backbone(config, seed=0, dtype=torch.float32)), dtype=dtype), 384


def peak_mib(way: str) -> float:
    """Peak resident memory of this command, doing one thing only."""
    child = subprocess.run(
        [sys.executable, *sys.orig_argv[1:]],
        env={**os.environ, ONLY: way, "BENCH_OUT": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(child.stdout.splitlines()[-1])["peak_mib"])


def own_peak_mib() -> float:
    """Of this program alone: `getrusage` would begin with what the one had that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    options = arguments(__doc__, rows=8, batches=4, length=64, runs=8, rounds=3, bits=0)
    dtype = torch.float32 if options.bits == 32 else serving_dtype("cpu")
    work = Workload(options.backbone, rows=options.rows, batches=options.batches, length=options.length, dtype=dtype)
    seen, unseen = work.data(work.seen()), work.data(None)
    ways: dict[str, Callable[[], None]] = {
        "epoch": lambda: work.together(1, seen),
        "epoch_through_the_stem": lambda: work.together(1, unseen),
        "released_epoch": work.released(),
        "together": lambda: work.together(options.runs, seen),
        "one_after_another": lambda: work.one_after_another(options.runs, seen),
        "together_through_the_stem": lambda: work.together(options.runs, unseen),
        "one_after_another_through_the_stem": lambda: work.one_after_another(options.runs, unseen),
    }
    if only := os.environ.get(ONLY):
        ways[only]()
        print(json.dumps({"peak_mib": own_peak_mib()}))
        return
    seconds = side_by_side(ways, options.rounds)
    prompts = sum(parameter.numel() * 4 for parameter in work.runs(1, seen)[0].method.parameters.values())
    report(
        "tuning",
        options.backbone,
        dtype=dtype,
        rows=options.rows,
        steps=options.batches,
        runs=options.runs,
        epoch_s=seconds["epoch"],
        of_released=seconds["released_epoch"] / seconds["epoch"],
        of_released_through_the_stem=seconds["released_epoch"] / seconds["epoch_through_the_stem"],
        together=seconds["one_after_another"] / seconds["together"],
        together_through_the_stem=(
            seconds["one_after_another_through_the_stem"] / seconds["together_through_the_stem"]
        ),
        prompt_mib=prompts / 2**20,
        peak_mib={way: round(peak_mib(way)) for way in ("epoch", "together", "released_epoch")},
    )


if __name__ == "__main__":
    main()
