"""Each method trains what its paper says, counts it as published, and leaves the backbone bit for bit as it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import tiny
from promptmux_kernels import pack_rows
from promptmux_prompts.importers.ofa import fold_generator, split_table
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.sizes import OFA_SIZES
from promptmux_server.backbone.weights import LoadedBackbone, fingerprint
from promptmux_server.backbone.weights.names import expected_shapes
from promptmux_server.training.batch import TrainingBatch, seen
from promptmux_server.training.chance import Chance
from promptmux_server.training.initial import Begin
from promptmux_server.training.methods import Adapters, BitFit, DeepPrompts, FineTuning, Method, trainable
from promptmux_server.training.methods.prompts import prompt_shapes
from promptmux_server.training.methods.twin import twin
from promptmux_server.training.recipe import PromptRecipe, RecipeError, StepRecipe
from promptmux_server.training.run import Run
from tuning_cases import OneBatch, RandomBatches, curves

PUBLISHED = {
    "tiny": (33_488_336, 262_144, 409_600, 412_448, 822_848, 15_872),
    "medium": (92_892_000, 524_288, 819_200, 824_096, 1_644_096, 31_744),
    "base": (182_238_536, 1_179_648, 1_843_200, 1_853_616, 3_698_016, 70_656),
    "large": (472_977_152, 3_145_728, 4_915_200, 4_942_176, 9_859_776, 186_368),
    "huge": (929_486_848, 5_898_240, 9_216_000, 9_265_680, 18_485_280, 340_480),
}
"""All parameters; prompts of 64 and 100; adapters of 100 and 200; BitFit as released (paper, 6)."""


def prompt_numbers(size: str, **recipe: object) -> int:
    shapes = prompt_shapes(OFA_SIZES[size], PromptRecipe(**recipe))  # type: ignore[arg-type]
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("size", PUBLISHED)
def test_trainable_parameters_are_those_published(size: str) -> None:
    config = OFA_SIZES[size]
    whole, short, long, narrow, wide, biases = PUBLISHED[size]
    with torch.device("meta"):
        model, loaded = (
            OFA(config),
            LoadedBackbone(config, {n: torch.empty(s) for n, s in expected_shapes(config).items()}),
        )
    assert [prompt_numbers(size, encoder_length=n, decoder_length=n) for n in (64, 100)] == [short, long]
    assert [trainable(Adapters(model, seed=1, width=n)) for n in (100, 200)] == [narrow, wide]
    assert trainable(BitFit(model)) == biases
    assert trainable(FineTuning(loaded, "meta")) + image_generation_only(size) == whole


def image_generation_only(size: str) -> int:
    """What the released models have besides: for writing image codes, which is not served here."""
    config = OFA_SIZES[size]
    positions = config.image_bucket_size**2 + 1
    relative = config.decoder_layers * ((2 * config.image_bucket_size - 1) ** 2 + 3) * config.heads
    return positions * config.d_model + 2 * 2 * config.d_model + relative


def test_an_mlp_generator_trains_as_many_as_published() -> None:
    assert prompt_numbers("large", generator="mlp") == 105_041_920


def test_full_bitfit_trains_every_bias_and_nothing_else() -> None:
    names = BitFit(tiny.model(), "full").parameters.keys()
    assert names == {name for name, _ in tiny.model().named_parameters() if name.endswith(".bias")}
    assert BitFit(tiny.model()).parameters.keys() < names


METHODS: dict[str, Callable[[OFA], Method]] = {
    "table": lambda model: DeepPrompts(model, PromptRecipe(encoder_length=4, decoder_length=3), seed=1),
    "mlp": lambda model: DeepPrompts(
        model, PromptRecipe(encoder_length=4, decoder_length=3, generator="mlp", generator_width=16), seed=1
    ),
    "bitfit": BitFit,
    "bitfit-full": lambda model: BitFit(model, "full"),
    "adapters": lambda model: Adapters(model, seed=1, width=8),
    "fine-tuning": lambda model: FineTuning(LoadedBackbone(model.config, model.state_dict())),
}


def unfolded() -> OFA:
    """A copy of the tiny backbone with its batch normalisation, whose statistics could drift."""
    return twin(tiny.config(), {n: t.clone() for n, t in tiny.backbone().tensors.items()}, folded=False)


def train_three_steps(method: Method) -> None:
    """With backbone dropout and all."""
    recipe = StepRecipe(steps=3, learning_rate=0.01, backbone_dropout=0.1, backbone_drop_path=0.1)
    curves([Run("only", method, recipe, RandomBatches(1, rows=4))])


@pytest.mark.parametrize("name", METHODS)
def test_training_changes_what_learns_and_no_bit_of_the_backbone(name: str) -> None:
    model = unfolded()
    before = fingerprint(model.state_dict())
    method = METHODS[name](model)
    initial = {n: p.detach().clone() for n, p in method.parameters.items()}
    frozen = {n: t.clone() for n, t in method.model.state_dict().items() if n not in method.parameters}
    train_three_steps(method)
    assert fingerprint(model.state_dict()) == before
    assert fingerprint({n: method.model.state_dict()[n] for n in frozen}) == fingerprint(frozen)
    changed = [n for n, p in method.parameters.items() if not torch.equal(p, initial[n])]
    assert len(changed) > 0.9 * len(initial)


@torch.no_grad()
def test_a_stem_in_training_mode_would_have_drifted() -> None:
    model = unfolded()
    before = fingerprint(model.state_dict())
    model.train().image_tokens(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    assert fingerprint(model.state_dict()) != before


def test_a_backbone_that_would_change_is_refused() -> None:
    learning, drifting = unfolded(), unfolded()
    learning.encoder.layer_norm.weight.requires_grad_(True)
    drifting.train()
    for model in (learning, drifting):
        with pytest.raises(ValueError, match="not frozen"):
            DeepPrompts(model, PromptRecipe(), seed=1)


@pytest.mark.parametrize("name", ["bitfit", "adapters"])
def test_baselines_hold_the_backbones_own_tensors(name: str) -> None:
    model = tiny.model()
    method = METHODS[name](model)
    ours, theirs = method.model.state_dict(), model.state_dict()
    shared = [n for n in theirs if ours[n].data_ptr() == theirs[n].data_ptr()]
    assert set(shared) == set(theirs) - set(method.parameters)


@pytest.mark.parametrize("name", ["bitfit-full", "fine-tuning"])
def test_what_trains_the_stem_takes_no_picture_that_the_frozen_stem_saw(name: str) -> None:
    batch, _ = RandomBatches(1, rows=4).take(0)
    shown = TrainingBatch(batch.examples, seen(tiny.model(), batch.pictures))
    run = Run("only", METHODS[name](unfolded()), StepRecipe(steps=1), OneBatch(shown))
    with pytest.raises(ValueError, match="pixels"):
        curves([run])


def test_weights_in_16_bits_are_not_trained() -> None:
    model = twin(tiny.config(), {n: t.bfloat16() for n, t in tiny.model().state_dict().items()}, folded=True)
    with pytest.raises(ValueError, match="float32"):
        BitFit(model)


def test_adapters_are_not_put_behind_adapters() -> None:
    with pytest.raises(ValueError, match="already"):
        Adapters(Adapters(tiny.model(), seed=1, width=4).model, seed=1)


@pytest.mark.parametrize("generator", ["table", "mlp"])
def test_a_saved_prompt_is_the_folded_generator(generator: str) -> None:
    config = tiny.config()
    method = METHODS[generator](tiny.model())
    saved = method.saved({n: p.detach() for n, p in method.parameters.items()})
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        own = {n.removeprefix(f"{side}."): p for n, p in method.parameters.items() if n.startswith(side)}
        key, value = split_table(fold_generator(own), layers, config.heads)
        assert torch.equal(saved[f"{side}.prefix.key"], key)
        assert torch.equal(saved[f"{side}.prefix.value"], value)
        assert saved[f"{side}.prefix.key"].is_contiguous()


def test_a_side_of_length_zero_is_left_out() -> None:
    method = DeepPrompts(tiny.model(), PromptRecipe(encoder_length=5, decoder_length=0), seed=1)
    assert list(method.parameters) == ["encoder.embedding.weight"]
    assert method.saved(method.parameters)["decoder.prefix.key"].shape == (3, 2, 0, 32)


def test_a_prompt_begins_with_the_rows_it_is_given() -> None:
    rows = torch.full((2, 2 * 2 * 64), 7.0)
    recipe = PromptRecipe(encoder_length=5, decoder_length=1)
    method = DeepPrompts(tiny.model(), recipe, seed=1, begin=Begin(encoder=rows))
    assert torch.equal(method.parameters["encoder.embedding.weight"][:2], rows)
    with pytest.raises(RecipeError, match="generator"):
        DeepPrompts(tiny.model(), PromptRecipe(generator="mlp"), seed=1, begin=Begin(encoder=rows))


def test_dropout_thins_every_rows_prompt_on_its_own_in_training_only() -> None:
    method = METHODS["table"](tiny.model())
    thinned = method.prompts(2, Chance(seed=1, step=0, part=0))
    plain = method.prompts(2, None)
    assert thinned is not None
    assert plain is not None
    thinned_rows, plain_rows = (pack_rows([sides[0]], torch.float32) for sides in (thinned, plain))
    first, second = (thinned_rows.select([row]).layer(0).gather(0)[0] for row in (0, 1))
    assert 0.1 < float((first == 0).float().mean()) < 0.3
    assert not torch.equal(first == 0, second == 0)
    kept = first != 0
    one, other = (plain_rows.layer(0).gather(row)[0] for row in (0, 1))
    torch.testing.assert_close(first[kept], one[kept] / 0.8, rtol=1e-5, atol=0)
    assert torch.equal(one, other)
