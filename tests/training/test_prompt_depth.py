"""A prompt that lives in some layers learns there alone, and is trained as it will be served."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import tiny
from promptmux_kernels import pack_rows
from promptmux_prompts import Prompt
from promptmux_server.backbone.sizes import OFA_SIZES
from promptmux_server.engine.prompt_table import PromptPools
from promptmux_server.training.batch import seen
from promptmux_server.training.forward import supervised_logits
from promptmux_server.training.initial import Begin
from promptmux_server.training.methods import DeepPrompts
from promptmux_server.training.methods.prompts import prompt_shapes
from promptmux_server.training.recipe import Generator, PromptRecipe, RecipeError, StepRecipe
from promptmux_server.training.run import Run
from tuning_cases import RandomBatches, curves

LAYERS = {"encoder_layers": (1, 2), "decoder_layers": (0, 2)}
"""Of two and three."""
SAVED = ("encoder.prefix.key", "encoder.prefix.value", "decoder.prefix.key", "decoder.prefix.value")


def method(generator: Generator = "table") -> DeepPrompts:
    recipe = PromptRecipe(
        encoder_length=4, decoder_length=3, encoder_layers=(1, 2), decoder_layers=(0, 2), generator=generator
    )
    return DeepPrompts(tiny.model(), recipe, seed=1)


@pytest.mark.parametrize("generator", ["table", "mlp"])
def test_only_layers_that_carry_the_prompt_learn_and_the_others_are_saved_as_zeros(generator: Generator) -> None:
    made = method(generator)
    curves([Run("only", made, StepRecipe(steps=3, backbone_dropout=0.1), RandomBatches(1, rows=4))])
    name, axis = ("embedding.weight", 1) if generator == "table" else ("trans.2.weight", 0)
    assert made.parameters[f"encoder.{name}"].shape[axis] == 1 * 2 * 64
    assert made.parameters[f"decoder.{name}"].shape[axis] == 2 * 2 * 64
    saved = made.saved(made.parameters)
    for side, present in (("encoder", [False, True]), ("decoder", [True, True, False])):
        for part in ("key", "value"):
            assert [bool(layer.any()) for layer in saved[f"{side}.prefix.{part}"]] == present


def test_half_the_layers_are_half_the_numbers() -> None:
    def numbers(recipe: PromptRecipe) -> int:
        return sum(math.prod(shape) for shape in prompt_shapes(OFA_SIZES["base"], recipe).values())

    assert 2 * numbers(PromptRecipe(encoder_layers=(0, 3), decoder_layers=(3, 6))) == numbers(PromptRecipe())


def test_training_reads_a_prompt_as_it_will_be_served() -> None:
    """The control: with zeros for the layers that do not carry it, other words are likely."""
    made, rows = method(), 6
    batch, _ = RandomBatches(1, rows).take(0)
    images = seen(tiny.model(), batch.pictures)
    sides = made.prompts(rows, None)

    @torch.no_grad()
    def trained(*layers: range | None) -> torch.Tensor:
        packed = [
            pack_rows([replace(side, layers=own)], torch.float32) for side, own in zip(sides, layers, strict=True)
        ]
        return supervised_logits(tiny.model(), batch.examples, images, *packed)[0]

    saved = made.saved(made.parameters)
    prompt = Prompt.build(tiny.prompt(**LAYERS).manifest, *(saved[name] for name in SAVED))  # type: ignore[arg-type]
    pools = PromptPools(tiny.config(), torch.float32, torch.device("cpu"))
    served = pools.batch([pools.store(prompt)] * rows)
    with torch.no_grad():
        expected, _ = supervised_logits(tiny.model(), batch.examples, images, served.encoder, served.decoder)
    found = trained(*(side.layers for side in sides))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert float((trained(None, None) - expected).abs().max()) > 1e-2


def test_a_prompt_of_some_layers_begins_with_their_part_of_the_rows() -> None:
    rows = torch.arange(3 * 2 * 64.0).repeat(3, 1)  # a row has as many numbers as the decoder's three layers
    recipe = PromptRecipe(encoder_length=1, decoder_length=3, decoder_layers=(1, 2))
    begun = DeepPrompts(tiny.model(), recipe, seed=1, begin=Begin(decoder=rows))
    assert torch.equal(begun.parameters["decoder.embedding.weight"], rows[:, 128:256])


@pytest.mark.parametrize("layers", [{"encoder_layers": (0, 3)}, {"decoder_layers": (3, 4)}], ids=str)
def test_layers_beyond_the_backbones_are_refused(layers: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(RecipeError, match=r"coder_layers must lie within \[0, [23]\], the backbone's layers"):
        DeepPrompts(tiny.model(), PromptRecipe(**layers), seed=1)  # type: ignore[arg-type]
