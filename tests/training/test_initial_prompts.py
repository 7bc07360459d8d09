"""A prompt that begins as a text carries what every layer would see of that text."""

from __future__ import annotations

from typing import cast

import torch

import tiny
from promptmux_prompts.importers.ofa import split_table
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.backbone.layers import EncoderLayer
from promptmux_server.training.initial import NOISE, initial_table, text_table

TEXT = (BOS, 10, 11, 12, EOS)


def test_the_first_layers_keys_and_values_are_those_of_the_embedded_text() -> None:
    model = tiny.model()
    key, value = split_table(text_table(model, TEXT), model.config.encoder_layers, model.config.heads)
    encoder, first = model.encoder, cast(EncoderLayer, model.encoder.layers[0])
    embedded = encoder.embed_tokens(torch.tensor(TEXT)) + encoder.type_embedding.weight[0]
    normed = first.self_attn_layer_norm(encoder.layernorm_embedding(embedded))
    for found, projection in ((key, first.self_attn.k_proj), (value, first.self_attn.v_proj)):
        torch.testing.assert_close(found[0].transpose(0, 1).flatten(1), projection(normed))


def test_reading_a_text_leaves_no_hook_behind() -> None:
    model = tiny.model()
    text_table(model, TEXT)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_text_fills_the_first_rows_and_noise_the_rest() -> None:
    text = torch.full((3, 4000), 7.0)
    table = initial_table(5, 4000, seed=1, text=text)
    assert torch.equal(table[:3], text)
    assert 0.9 * NOISE < float(table[3:].std()) < 1.1 * NOISE
    assert torch.equal(initial_table(2, 4000, seed=1, text=text), text[:2])
