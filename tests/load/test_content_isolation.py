"""What the neighbours ask about changes no bit of an answer, as long as the batch keeps its shape (A-19)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import tiny
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.engine import runner
from promptmux_server.engine.decoding import make_search
from promptmux_server.engine.prompt_table import PromptPools, Residence
from promptmux_server.engine.runner import RunningBatch, Work, closed_batch
from promptmux_server.tasks.decoding import DecodingParams

STEPS, CHANGES = 4, 50
LENGTHS = (1, 7, 64, 100)
"""Of the prompts; there are several of each."""


@dataclass(frozen=True)
class Row:
    """One request of a batch: its prompt, source ids (bos ... eos), and picture."""

    prompt: int
    source: tuple[int, ...]
    image: ImageTokens | None


@dataclass(frozen=True)
class Shape:
    """What of a row is fixed while its content changes."""

    prompt_length: int
    words: int
    pixels: tuple[int, int] | None


MIXED = tuple(
    Shape(LENGTHS[row % 4], words, pixels)
    for row, (words, pixels) in enumerate(
        [(5, (64, 64)), (3, None), (17, (32, 96)), (1, (64, 64)), (30, None), (9, (96, 32)), (2, None), (12, (64, 64))]
    )
)
ALIKE = (Shape(7, 9, (64, 64)),) * 8


class Contents:
    """Rows of a given shape, as many as one likes, all different."""

    def __init__(self) -> None:
        self.pools = PromptPools(tiny.config(), torch.float32, torch.device("cpu"))
        self.homes = [
            self.pools.store(tiny.prompt(f"p{seed}", seed=seed, encoder_length=length, decoder_length=length))
            for seed, length in enumerate(LENGTHS * 4)
        ]
        self._chance, self._noise = random.Random(4), torch.Generator().manual_seed(4)

    def row(self, shape: Shape) -> Row:
        prompt = LENGTHS.index(shape.prompt_length) + 4 * self._chance.randrange(4)
        source = (BOS, *(self._chance.randrange(4, 300) for _ in range(shape.words)), EOS)
        if shape.pixels is None:
            return Row(prompt, source, None)
        with torch.no_grad():
            (image,) = tiny.model().image_tokens(torch.randn(1, 3, *shape.pixels, generator=self._noise))
        return Row(prompt, source, image)

    def home(self, row: Row) -> Residence:
        return self.homes[row.prompt]


@pytest.fixture(scope="module")
def contents() -> Contents:
    return Contents()


def logits(contents: Contents, rows: Sequence[Row]) -> Tensor:
    """All logits (rows, 1 + steps, V) of a batch that decodes greedily."""
    params = DecodingParams(method="greedy", min_length=STEPS, max_length=STEPS)
    works = [Work(row.source, (BOS,), row.image, make_search(params)) for row in rows]
    heard: list[Tensor] = []

    class Recording(RunningBatch):
        def _advance(self, part: Sequence[Any], logits: Tensor) -> None:
            heard.append(logits.clone())
            super()._advance(part, logits)

    with torch.no_grad(), patch.object(runner, "RunningBatch", Recording):
        batch = closed_batch(tiny.model(), works, contents.pools.batch([contents.home(row) for row in rows]))
        while batch.live_rows:
            batch.step()
    assert {len(part) for part in heard} == {len(rows)}
    return torch.stack(heard, dim=1)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_new_neighbours_of_the_same_shape_change_no_bit(contents: Contents, place: int) -> None:
    own = contents.row(MIXED[place])
    found, others = [], []
    for _ in range(CHANGES):
        rows = [own if row == place else contents.row(shape) for row, shape in enumerate(MIXED)]
        all_rows = logits(contents, rows)
        found.append(all_rows[place])
        others.append(all_rows[place - 1])
    assert all(torch.equal(one, found[0]) for one in found)
    assert not any(torch.equal(one, others[0]) for one in others[1:])  # the control: the neighbours did change


def test_every_place_in_a_batch_of_like_rows_gives_the_same_bits(contents: Contents) -> None:
    own = contents.row(ALIKE[0])
    found = []
    for place in range(len(ALIKE)):
        rows = [own if row == place else contents.row(shape) for row, shape in enumerate(ALIKE)]
        found.append(logits(contents, rows)[place])
    assert all(torch.equal(one, found[0]) for one in found)


def test_another_shape_changes_some_bit(contents: Contents) -> None:
    """The control: were products the same bits whatever their shape, the tests above would show nothing."""
    own = contents.row(MIXED[0])
    found = [logits(contents, [own, *(contents.row(shape) for shape in MIXED[1:count])])[0] for count in range(1, 9)]
    assert any(not torch.equal(one, found[0]) for one in found)
    assert all(torch.allclose(one, found[0], atol=1e-3) for one in found)
