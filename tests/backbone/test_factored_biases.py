"""Position biases in factors say the same as dense tables, and serve where those would be too large."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tiny
from promptmux_kernels import BiasFactors
from promptmux_server.backbone.encoder import EncoderRow
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.positions import NO_IMAGE, Grid


@pytest.fixture
def model() -> Iterator[OFA]:
    model = tiny.model()
    model.encoder._biases.clear()
    yield model
    model.encoder.factored_above = None
    model.encoder._biases.clear()


@pytest.mark.parametrize("grid", [NO_IMAGE, (1, 1), (4, 4), (3, 7)], ids=str)
@pytest.mark.parametrize("text_length", [1, 32, 128])
def test_factors_multiply_out_to_the_dense_tables(model: OFA, grid: Grid, text_length: int) -> None:
    dense = model.encoder._build_biases(grid, text_length)
    for table, factors in zip(dense, model.encoder._build_factors(grid, text_length), strict=True):
        torch.testing.assert_close(factors.dense(), table, atol=1e-5, rtol=0)


def test_tables_beyond_the_budget_stay_in_factors_and_change_no_state(model: OFA) -> None:
    image = model.image_tokens(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))[0]
    rows = [EncoderRow((0, 10, 11, 2), image), EncoderRow((0, 12, 2))]
    dense = model.encode(rows).states
    model.encoder._biases.clear()
    model.encoder.factored_above = 0  # which the picture's tables exceed; without a picture there is nothing to save
    assert isinstance(model.encoder.biases(image.grid, 32)[0], BiasFactors)
    assert not isinstance(model.encoder.biases(NO_IMAGE, 32)[0], BiasFactors)
    torch.testing.assert_close(model.encode(rows).states, dense, atol=2e-5, rtol=0)


def test_the_longest_text_of_a_batch_does_not_decide_on_factors(model: OFA) -> None:
    config = model.config
    picture_bytes = config.encoder_layers * config.heads * (4 * 4) ** 2 * 4
    model.encoder.factored_above = picture_bytes
    for text_length in (32, 128):
        assert not isinstance(model.encoder.biases((4, 4), text_length)[0], BiasFactors)
    model.encoder.factored_above = picture_bytes - 1
    model.encoder._biases.clear()
    for text_length in (32, 128):
        assert isinstance(model.encoder.biases((4, 4), text_length)[0], BiasFactors)
