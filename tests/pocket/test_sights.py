"""What the encoder should know of each patch is the truth, and knowing it costs nothing."""

from __future__ import annotations

import pytest
import torch

from promptmux_server.backbone.encoder import EncoderRow
from promptmux_server.backbone.model import OFA
from promptmux_server.pocket.patches import GRID, WORDS
from promptmux_server.pocket.recipe import pocket_config
from promptmux_server.pocket.scenes import Scene, SceneObject
from promptmux_server.pocket.sights import BACKGROUND, COUNT_ANSWERS, PATCHES, TURN_ANSWERS, SightHead, sight_truth

LEFT = SceneObject("cat", (0.0, 0.0, 32.0, 32.0))
MIDDLE = SceneObject("dog", (48.0, 48.0, 80.0, 80.0))
RIGHT = SceneObject("cat", (96.0, 96.0, 128.0, 128.0))
SCENE = Scene(0, "blue", (MIDDLE, RIGHT, LEFT))


def test_a_patch_knows_how_many_its_kind_has_and_when_a_list_comes_to_it() -> None:
    truth = sight_truth(SCENE).view(GRID, GRID, 3)
    cat, dog, blue = (WORDS.index(word) for word in ("cat", "dog", "blue"))
    assert truth[0, 0].tolist() == [cat, 2, 0]
    assert truth[3, 3].tolist() == [dog, 1, 1]
    assert truth[7, 7].tolist() == [cat, 2, 0]  # one word for both cats, where the left one stands
    assert truth[0, 7].tolist() == [blue, BACKGROUND, BACKGROUND]


@pytest.fixture
def head() -> SightHead:
    """A head behind a pass of a picture's patches and one text; it says "two, to be named first" of all it sees."""
    torch.manual_seed(0)
    model = OFA(pocket_config(500), folded=False)
    head = SightHead(model)
    model.encode([EncoderRow((0, *range(4, 4 + PATCHES), 2))])
    with torch.no_grad():
        head.answers.weight.zero_()
        head.answers.bias.zero_()
        head.answers.bias[WORDS.index("cat")] = 20.0
        head.answers.bias[COUNT_ANSWERS][2] = 20.0
        head.answers.bias[TURN_ANSWERS][0] = 20.0
    return head


def everywhere(*things: SceneObject) -> Scene:
    return Scene(0, "blue", things)


@torch.no_grad()
def test_a_head_that_knows_the_truth_pays_nothing(head: SightHead) -> None:
    left = SceneObject("cat", (0.0, 0.0, 64.0, 128.0))
    right = SceneObject("cat", (64.0, 0.0, 128.0, 128.0))
    assert float(head.loss([(1, everywhere(left, right))])) == pytest.approx(0.0, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("scene", "wrong"),
    [
        (everywhere(SceneObject("cat", (0.0, 0.0, 128.0, 128.0))), "a count"),
        (everywhere(*2 * (SceneObject("dog", (0.0, 0.0, 128.0, 128.0)),)), "a word"),
        (
            everywhere(
                SceneObject("dog", (0.0, 0.0, 4.0, 4.0)),
                SceneObject("cat", (0.0, 0.0, 128.0, 128.0)),
                SceneObject("cat", (0.0, 0.0, 128.0, 128.0)),
            ),
            "a turn",
        ),
    ],
)
def test_each_part_of_it_can_be_wrong(head: SightHead, scene: Scene, wrong: str) -> None:
    assert float(head.loss([(1, scene)])) == pytest.approx(20.0, abs=0.5), wrong
