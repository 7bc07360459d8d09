"""Recipes: the released defaults, the schedule, and what cannot be followed."""

from __future__ import annotations

from itertools import pairwise

import pytest

from promptmux_server.training.recipe import ComputeRecipe, PromptRecipe, RecipeError, StepRecipe


def test_the_defaults_are_the_released_recipe() -> None:
    steps, prompt = StepRecipe(steps=100), PromptRecipe()
    assert (steps.learning_rate, steps.warmup, steps.weight_decay) == (0.03, 0.06, 0.01)
    assert (steps.clip_norm, steps.smoothing) == (1.0, 0.1)
    assert (prompt.encoder_length, prompt.decoder_length, prompt.dropout) == (64, 64, 0.2)


def test_the_rate_warms_up_linearly_and_falls_linearly_to_zero() -> None:
    recipe = StepRecipe(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[:11] == pytest.approx([*(n / 10 for n in range(1, 11)), 1.0])
    assert [a - b for a, b in pairwise(rates[10:])] == pytest.approx([1 / 90] * 89)
    assert rates[-1] == pytest.approx(1 / 90)


def test_a_single_step_learns() -> None:
    assert StepRecipe(steps=1, learning_rate=0.5).rate(0) == 0.5


def test_the_worst_tokens_are_dropped_after_the_step_named() -> None:
    recipe = StepRecipe(steps=9, drop_worst=0.2, drop_worst_after=3)
    assert [recipe.dropped(step) for step in range(6)] == [0.0, 0.0, 0.0, 0.0, 0.2, 0.2]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (PromptRecipe, {"encoder_length": 0, "decoder_length": 0}),
        (PromptRecipe, {"encoder_length": -1}),
        (PromptRecipe, {"encoder_layers": (1, 1)}),
        (PromptRecipe, {"encoder_layers": (0, 1, 2)}),
        (PromptRecipe, {"decoder_layers": (-1, 2)}),
        (PromptRecipe, {"decoder_layers": (0, 2), "decoder_length": 0}),
        (PromptRecipe, {"generator": "lstm"}),
        (PromptRecipe, {"generator_width": 0}),
        (PromptRecipe, {"dropout": 1.0}),
        (StepRecipe, {"steps": 0}),
        (StepRecipe, {"learning_rate": 0.0}),
        (StepRecipe, {"learning_rate": float("nan")}),
        (StepRecipe, {"warmup": 1.0}),
        (StepRecipe, {"weight_decay": -0.1}),
        (StepRecipe, {"average_decay": 1.0}),
        (StepRecipe, {"accumulation": 0}),
        (StepRecipe, {"seed": 2**63}),
        (StepRecipe, {"seed": -(2**63) - 1}),
        (ComputeRecipe, {"rows_per_pass": 0}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value.__name__,
)
def test_a_recipe_that_cannot_be_followed_names_its_field(kind: type, fields: dict[str, object]) -> None:
    values = {"steps": 10} | fields if kind is StepRecipe else fields
    with pytest.raises(RecipeError, match=next(iter(fields))):
        kind(**values)
