"""The yardstick of tuning learns what we learn: same loss, same gradients, padding and pictures and all."""

from __future__ import annotations

import random

import torch

import tiny
from promptmux_server.bench.released_tuning import ReleasedTuner
from promptmux_server.training.batch import TrainingBatch
from promptmux_server.training.forward import Example
from promptmux_server.training.methods import DeepPrompts
from promptmux_server.training.passes import backward
from promptmux_server.training.recipe import PLAINLY, PromptRecipe, StepRecipe
from promptmux_server.training.run import Run
from tuning_cases import OneBatch, example

LENGTH = 5


def examples() -> list[Example]:
    rng = random.Random(1)
    drawn = [example(rng) for _ in range(4)]
    longer = (*drawn[1].prefix, 30, 31)  # a decoder prefix that is not scored
    return [Example(e.source, longer if i == 1 else e.prefix, e.target, i) for i, e in enumerate(drawn)]


def test_the_released_loop_has_our_loss_and_our_gradients() -> None:
    model, pixels = tiny.model(), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    released = ReleasedTuner(model, LENGTH, dropout=0.0)
    recipe = PromptRecipe(encoder_length=LENGTH, decoder_length=LENGTH, dropout=0.0)
    run = Run(
        "ours",
        DeepPrompts(model, recipe, seed=1),
        StepRecipe(steps=1),
        OneBatch(TrainingBatch(examples(), list(pixels))),
    )
    (loss,) = backward([(run, run.take())], PLAINLY)
    total, tokens = released.loss(pixels, examples())
    total.backward()
    assert tokens == loss.tokens
    torch.testing.assert_close(float(total.detach()), loss.total, rtol=1e-5, atol=0)
    for table, parameter in zip(released.tables, run.method.parameters.values(), strict=True):
        assert table.grad is not None
        assert parameter.grad is not None
        torch.testing.assert_close(table.grad, parameter.grad, atol=1e-4 * float(parameter.grad.abs().max()), rtol=0)


def test_its_prompts_are_thinned_row_by_row() -> None:
    torch.manual_seed(1)
    pixels = torch.zeros(4, 3, 32, 32)
    thinned, plain = ReleasedTuner(tiny.model(), LENGTH), ReleasedTuner(tiny.model(), LENGTH, dropout=0.0)
    assert float(thinned.loss(pixels, examples())[0].detach()) != float(plain.loss(pixels, examples())[0].detach())
