"""Small runs on the tiny backbone, and their curves: what the trainer's tests share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

import tiny
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.backbone.model import OFA
from promptmux_server.training.batch import Batches, Cursor, TrainingBatch
from promptmux_server.training.cohort import Cohort, Failure
from promptmux_server.training.forward import Example
from promptmux_server.training.methods import DeepPrompts
from promptmux_server.training.recipe import PLAINLY, ComputeRecipe, PromptRecipe, StepRecipe
from promptmux_server.training.run import Run

Curve = list[tuple[float, float]]
"""Loss and gradient norm, step by step."""


class RandomBatches:
    """Endless batches of random texts about random pictures; the cursor is a batch's number."""

    def __init__(self, seed: int, rows: int) -> None:
        self._seed, self._rows = seed, rows

    def take(self, cursor: Cursor) -> tuple[TrainingBatch, Cursor]:
        number = cursor if isinstance(cursor, int) else 0
        rng = random.Random(1000 * self._seed + number)
        pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rng.randrange(10**6)))
        return TrainingBatch([example(rng) for _ in range(self._rows)], list(pictures)), number + 1


class OneBatch:
    """The same batch for ever."""

    def __init__(self, batch: TrainingBatch) -> None:
        self._batch = batch

    def take(self, cursor: Cursor) -> tuple[TrainingBatch, Cursor]:
        return self._batch, cursor


def example(rng: random.Random) -> Example:
    words = [[rng.randrange(4, 100) for _ in range(rng.randrange(1, longest))] for longest in (8, 4)]
    return Example((BOS, *words[0], EOS), (BOS,), tuple(words[1]), rng.choice([None, 0, 1]))


PROMPTS = (
    PromptRecipe(encoder_length=4, decoder_length=3, dropout=0.2),
    PromptRecipe(encoder_length=40, decoder_length=5, encoder_layers=(0, 1), decoder_layers=(1, 3), dropout=0.0),
    PromptRecipe(
        encoder_length=7, decoder_length=0, encoder_layers=(1, 2), generator="mlp", generator_width=16, dropout=0.1
    ),
    PromptRecipe(encoder_length=0, decoder_length=6, dropout=0.2),
)
STEPS = (
    StepRecipe(steps=6, learning_rate=0.03, seed=1),
    StepRecipe(steps=9, learning_rate=0.05, weight_decay=0.1, seed=2),
    StepRecipe(steps=8, learning_rate=0.005, clip_norm=0.1, seed=3),
    StepRecipe(steps=7, learning_rate=0.01, smoothing=0.0, seed=4),
)


def tuning_run(index: int, *, model: OFA | None = None, data: Batches | None = None, **changes: object) -> Run:
    """Run `index` of four that differ in prompt, layers, rates, seeds, data and rows; `changes` to its steps."""
    steps = replace(STEPS[index], **changes)  # type: ignore[arg-type]
    method = DeepPrompts(model or tiny.model(), PROMPTS[index], seed=steps.seed)
    return Run(f"run-{index}", method, steps, data or RandomBatches(index, rows=3 + index))


def advance_all(
    cohort: Cohort, before: Callable[[int], None] = lambda advance: None
) -> tuple[dict[str, Curve], list[Failure]]:
    """Advance until no run is left; `before` is told which advance is next."""
    found: dict[str, Curve] = {}
    failures: list[Failure] = []
    number = 0
    before(number)
    while cohort.runs:
        advance = cohort.advance()
        for report in advance.steps:
            found.setdefault(report.run, []).append((report.loss, report.gradient_norm))
        failures += advance.failed
        number += 1
        before(number)
    return found, failures


def curves(runs: Sequence[Run], compute: ComputeRecipe = PLAINLY) -> dict[str, Curve]:
    """Train runs in one cohort to their ends."""
    cohort = Cohort(compute)
    for run in runs:
        cohort.join(run)
    found, failures = advance_all(cohort)
    assert failures == []
    return found


def difference(found: Curve, expected: Curve) -> float:
    """Largest relative difference of two curves; infinite if one is longer."""
    if len(found) != len(expected):
        return float("inf")
    pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)
