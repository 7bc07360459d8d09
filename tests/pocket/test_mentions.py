"""Texts' names of things are found where they stand, and what the encoder should know of them is the truth."""

from __future__ import annotations

import math

import pytest
import torch

from promptmux_server.backbone.encoder import EncoderRow
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.pocket import WEIGHTS
from promptmux_server.pocket.mentions import EDGE_ANSWERS, MentionHead, Names
from promptmux_server.pocket.patches import EDGE_BINS
from promptmux_server.pocket.recipe import NUM_BINS, pocket_config
from promptmux_server.pocket.scenes import Scene, SceneObject

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


def head_and_states() -> tuple[MentionHead, torch.Tensor]:
    """A head behind a pass of two tokens, and their places."""
    torch.manual_seed(0)
    model = OFA(pocket_config(TOKENIZER.text_vocab_size), folded=False)
    head = MentionHead(model)
    model.encode([EncoderRow((0, 2))])
    return head, torch.tensor([0, 1])


@torch.no_grad()
def right_answers(head: MentionHead) -> None:
    """Whatever is asked: one thing, teal, with the heart's edges. So it is right of a heart and wrong of a dog."""
    head.answers.weight.zero_()
    head.answers.bias.zero_()
    head.answers.bias[1] = 20.0
    head.answers.bias[5 + 10] = 20.0
    edges = head.answers.bias[EDGE_ANSWERS].view(4, EDGE_BINS)
    for edge, pixel in zip(edges, HEART.box, strict=True):
        edge -= 0.5 * ((torch.arange(EDGE_BINS) + 0.5) - pixel / 4).square()


@torch.no_grad()
def test_a_head_that_knows_the_truth_pays_only_for_the_edges_spread() -> None:
    head, places = head_and_states()
    right_answers(head)
    least = 0.5 * math.log(2 * math.pi * math.e)  # the entropy of the bell that edges are taught as
    assert float(head.loss(places[:1], [("heart", SCENE)])) == pytest.approx(least, abs=0.05)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dog", "cat"])
def test_what_holds_of_one_thing_is_wrong_of_another(kind: str) -> None:
    head, places = head_and_states()
    right_answers(head)
    assert float(head.loss(places[:1], [(kind, SCENE)])) > 5.0


@torch.no_grad()
def test_texts_that_name_nothing_cost_nothing() -> None:
    head, places = head_and_states()
    assert float(head.loss(places[:0], [])) == 0.0
