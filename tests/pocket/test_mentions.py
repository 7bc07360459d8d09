"""Texts' names of things are found where they stand, and what the encoder should know of them is the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from promptmux_server.backbone.encoder import EncoderRow
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.pocket import WEIGHTS
from promptmux_server.pocket.mentions import EDGE_ANSWERS, MentionHead, Named, Names
from promptmux_server.pocket.patches import EDGE_BINS
from promptmux_server.pocket.recipe import NUM_BINS, pocket_config
from promptmux_server.pocket.scenes import SIDE, Scene, SceneObject

TOKENIZER = Tokenizer.load(WEIGHTS, num_codes=0, num_bins=NUM_BINS)
NAMES = Names(TOKENIZER)
HEART = SceneObject("heart", (16.0, 16.0, 48.0, 48.0), "teal")
DOG = SceneObject("dog", (60.0, 60.0, 100.0, 90.0))
SCENE = Scene(0, "blue", (HEART, DOG))


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (" is the dog left of the cat?", ["dog", "cat"]),
        (" how many hot dogs are there?", ["hot dog"]),
        (" there is no hot dog", ["hot dog"]),
        (" two apples and a dog", ["apple", "dog"]),
        (" what color is the background?", []),
    ],
)
def test_names_are_found_in_texts(text: str, kinds: list[str]) -> None:
    ids = TOKENIZER.encode(text)
    found = NAMES.mentions(ids)
    assert [mention.kind for mention in found] == kinds
    for mention in found:
        said = TOKENIZER.decode(ids[: mention.place + 1])
        assert said.endswith((mention.kind, f"{mention.kind}s"))


@pytest.fixture
def head() -> MentionHead:
    """A head behind a pass of two tokens. Whatever it is asked, it says: one thing, teal, with the heart's edges, and
    the thing before it was far to the right and below. So it is right of a heart named after a dog."""
    torch.manual_seed(0)
    model = OFA(pocket_config(TOKENIZER.text_vocab_size), folded=False)
    head = MentionHead(model)
    model.encode([EncoderRow((0, 2))])
    with torch.no_grad():
        for answers in (head.found, head.compared):
            answers.weight.zero_()
            answers.bias.zero_()
        head.found.bias[1] = 20.0
        head.found.bias[5 + 10] = 20.0
        bells(head.found.bias[EDGE_ANSWERS], HEART.box)
        bells(head.compared.bias, [(SIDE + 32.0 - 80.0) / 2, (SIDE + 32.0 - 75.0) / 2])
    return head


def bells(bias: torch.Tensor, pixels: Sequence[float]) -> None:
    for edge, pixel in zip(bias.view(len(pixels), EDGE_BINS), pixels, strict=True):
        edge -= 0.5 * ((torch.arange(EDGE_BINS) + 0.5) - pixel / 4).square()


ENTROPY = 0.5 * math.log(2 * math.pi * math.e)
"""Of a bell one bin wide: what a place costs at least."""


@torch.no_grad()
def test_a_head_that_knows_the_truth_pays_only_for_the_places_spread(head: MentionHead) -> None:
    assert float(head.loss([Named(0, "heart", SCENE, None)])) == pytest.approx(ENTROPY, abs=0.05)
    assert float(head.loss([Named(1, "heart", SCENE, "dog")])) == pytest.approx(2 * ENTROPY, abs=0.05)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dog", "cat"])
def test_what_holds_of_one_thing_is_wrong_of_another(head: MentionHead, kind: str) -> None:
    assert float(head.loss([Named(0, kind, SCENE, None)])) > 5.0


@torch.no_grad()
def test_what_was_named_before_matters(head: MentionHead) -> None:
    scene = Scene(0, "blue", (HEART, SceneObject("cat", (0.0, 0.0, 8.0, 8.0))))
    assert float(head.loss([Named(0, "heart", scene, "cat")])) > 10.0


@torch.no_grad()
def test_texts_that_name_nothing_cost_nothing(head: MentionHead) -> None:
    assert float(head.loss([])) == 0.0


@pytest.mark.parametrize(
    ("kind", "before", "apart"),
    [("heart", "dog", (-48.0, -43.0)), ("dog", "heart", (48.0, 43.0)), ("dog", "dog", None), ("dog", "cat", None)],
)
def test_two_things_are_apart_where_both_are_there_once(
    kind: str, before: str, apart: tuple[float, float] | None
) -> None:
    assert Named(0, kind, SCENE, before).apart == apart
