"""What the encoder should know of each patch: what it shows, how many of those there are, and when a list comes to it.

A caption says little about which of the pictures' patches earned it. Told patch by patch behind the last layer, a patch
keeps what the stem saw in it, and knows when its thing is to be named: from left to right, once a kind. The head that
reads it serves pretraining only. Knows no sample and no loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmux_server.backbone.model import OFA
from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.patches import GRID, WORDS, patch_truth
from promptmux_server.pocket.questions import NUMBERS
from promptmux_server.pocket.scenes import Scene

PATCHES = GRID * GRID
BACKGROUND = -100
"""Patches that show no thing have no count and no turn."""
WORD_ANSWERS = slice(0, len(WORDS))
COUNT_ANSWERS = slice(WORD_ANSWERS.stop, WORD_ANSWERS.stop + len(NUMBERS))
TURN_ANSWERS = slice(COUNT_ANSWERS.stop, COUNT_ANSWERS.stop + len(NUMBERS) - 1)


def sight_truth(scene: Scene) -> Tensor:
    """(64, 3) int64: each patch's word, the count of its kind, and its kind's turn in a list from left to right."""
    turns = {kind: turn for turn, kind in enumerate(dict.fromkeys(o.kind for o in scene.left_to_right))}
    known = {list(KINDS).index(kind): (scene.count(kind), turn) for kind, turn in turns.items()}
    word = patch_truth(scene).word
    rest = torch.tensor([known.get(index, (BACKGROUND, BACKGROUND)) for index in word.tolist()])
    return torch.cat([word[:, None], rest], 1)


class SightHead(nn.Module):
    """Reads what the encoder knows of patches off the states of its last pass."""

    def __init__(self, model: OFA) -> None:
        super().__init__()
        width = model.config.d_model
        self.norm, self.answers = nn.LayerNorm(width), nn.Linear(width, TURN_ANSWERS.stop)
        self._states: dict[str, Tensor] = {}
        model.encoder.layers[-1].register_forward_hook(lambda _, __, states: self._states.update(last=states))

    def loss(self, seen: Sequence[tuple[int, Scene]]) -> Tensor:
        """Mean losses of words, counts and turns, added up.

        Each scene comes with the place of its first patch on the flat axis of the encoder's last pass.
        """
        places = torch.cat([torch.arange(place, place + PATCHES) for place, _ in seen])
        answers = self.answers(self.norm(self._states["last"][places])).float()
        truth = torch.cat([sight_truth(scene) for _, scene in seen])
        parts = (WORD_ANSWERS, COUNT_ANSWERS, TURN_ANSWERS)
        losses = [
            F.cross_entropy(answers[:, part], truth[:, i], ignore_index=BACKGROUND) for i, part in enumerate(parts)
        ]
        return torch.stack(losses).sum()
