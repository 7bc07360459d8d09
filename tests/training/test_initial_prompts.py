"""A prompt that begins as texts holds what every layer sees of them; one that begins as prompts holds their mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

import tiny
from promptmux_prompts.importers.ofa import join_table, split_table
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.backbone.encoder import EncoderRow
from promptmux_server.backbone.layers import DecoderLayer, EncoderLayer
from promptmux_server.training.initial import NOISE, begin_of_prompts, begin_of_texts, initial_table, thinned

TEXT = (BOS, 10, 11, 12, EOS)
LABEL = (BOS, 20, EOS)


def tables(*texts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    begin = begin_of_texts(tiny.model(), texts)
    assert begin.encoder is not None
    assert begin.decoder is not None
    return begin.encoder, begin.decoder


def inputs(layers: nn.ModuleList, read: Callable[[], object]) -> list[Tensor]:
    """What each layer is given while something is read."""
    given: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _layer, arguments: given.append(arguments[0])) for layer in layers]
    read()
    for hook in hooks:
        hook.remove()
    return given


def assert_holds(table: Tensor, layers: nn.ModuleList, given: list[Tensor]) -> None:
    """K and V of every layer are projections of its own normalised input."""
    assert len(given) == len(layers)
    key, value = split_table(table, len(layers), tiny.config().heads)
    for index, (module, x) in enumerate(zip(layers, given, strict=True)):
        layer = cast(EncoderLayer | DecoderLayer, module)
        for found, projection in ((key, layer.self_attn.k_proj), (value, layer.self_attn.v_proj)):
            expected = projection(layer.self_attn_layer_norm(x))
            torch.testing.assert_close(found[index].transpose(0, 1).flatten(1), expected)


@torch.no_grad()
def test_the_encoders_keys_and_values_of_a_text_are_those_of_every_layer() -> None:
    model = tiny.model()
    given = inputs(model.encoder.layers, lambda: model.encode([EncoderRow(TEXT)]))
    assert_holds(tables(TEXT)[0], model.encoder.layers, given)


@torch.no_grad()
def test_the_decoder_reads_the_text_behind_the_encoders_reading_of_it() -> None:
    model = tiny.model()
    memory = model.remember(model.encode([EncoderRow(TEXT)]))
    given = inputs(model.decoder.layers, lambda: model.teach([TEXT[:-1]], memory))
    assert_holds(tables(TEXT)[1], model.decoder.layers, given)


def test_several_texts_are_read_alone_and_stand_one_behind_the_other() -> None:
    both, first, second = tables(TEXT, LABEL), tables(TEXT), tables(LABEL)
    for found, one, other in zip(both, first, second, strict=True):
        assert torch.equal(found, torch.cat([one, other]))


def test_reading_a_text_leaves_no_hook_behind() -> None:
    model = tiny.model()
    tables(TEXT)
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_that_are_too_few_are_followed_by_noise() -> None:
    rows = torch.full((3, 4000), 7.0)
    table = initial_table(5, 4000, seed=1, rows=rows)
    assert torch.equal(table[:3], rows)
    assert 0.9 * NOISE < float(table[3:].std()) < 1.1 * NOISE


def test_noise_stands_where_rows_say_nothing() -> None:
    rows = torch.full((3, 4000), 7.0)
    rows[:, :1000] = torch.nan
    table = initial_table(3, 4000, seed=1, rows=rows)
    assert torch.equal(table[:, :1000], initial_table(3, 4000, seed=1)[:, :1000])
    assert torch.equal(table[:, 1000:], rows[:, 1000:])


def test_rows_that_are_too_many_are_thinned_evenly() -> None:
    rows = torch.arange(10.0)[:, None]
    assert thinned(rows, 4)[:, 0].tolist() == [0, 2, 5, 7]
    assert torch.equal(thinned(rows, 10), rows)
    assert torch.equal(initial_table(4, 1, seed=1, rows=rows), thinned(rows, 4))


def test_one_prompt_of_the_same_lengths_is_taken_as_it_is() -> None:
    prompt = tiny.prompt(encoder_length=4, decoder_length=3)
    begin = begin_of_prompts([prompt], 4, 3)
    assert begin.encoder is not None
    assert begin.decoder is not None
    assert torch.equal(begin.encoder, join_table(prompt.encoder_key, prompt.encoder_value))
    assert torch.equal(begin.decoder, join_table(prompt.decoder_key, prompt.decoder_value))


def test_a_mean_of_prompts_is_taken_over_those_that_have_the_row() -> None:
    long = tiny.prompt(seed=1, encoder_length=6, decoder_length=2)
    short = tiny.prompt(seed=2, encoder_length=2, decoder_length=0)
    begin = begin_of_prompts([long, short], 4, 3)
    ours, theirs = (join_table(each.encoder_key, each.encoder_value) for each in (long, short))
    assert begin.encoder is not None
    assert begin.decoder is not None
    torch.testing.assert_close(begin.encoder[:2], (ours[[0, 1]] + theirs) / 2)
    assert torch.equal(begin.encoder[2:], ours[[3, 4]])
    assert torch.equal(begin.decoder, join_table(long.decoder_key, long.decoder_value))


def test_a_prompt_counts_in_the_layers_that_carry_it_alone() -> None:
    bottom = tiny.prompt(seed=1, encoder_layers=(0, 1), decoder_layers=(0, 2))
    middle = tiny.prompt(seed=2, encoder_layers=(0, 1), decoder_layers=(1, 2))
    begin = begin_of_prompts([bottom, middle], 4, 3)
    assert begin.encoder is not None
    assert begin.decoder is not None
    assert split_table(begin.encoder, 2, 2)[1][1].isnan().all()  # neither has the second layer
    key, _ = split_table(begin.decoder, 3, 2)
    torch.testing.assert_close(key[0], bottom.decoder_key[0])
    torch.testing.assert_close(key[1], (bottom.decoder_key[1] + middle.decoder_key[1]) / 2)
    assert key[2].isnan().all()
