"""What the encoder should know of each thing that a text names: how many there are, where it is, which colour.

A yes or a no says little about which of the things that a question names was looked up wrongly; here every name is told
what it stands for, at the layer below which it must have been found, so that the layers above can compare. The head
that reads it serves pretraining only. Knows no sample and no loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.colours import TINTS
from promptmux_server.pocket.patches import EDGE_BINS, UNTINTED, edge_targets
from promptmux_server.pocket.questions import NUMBERS
from promptmux_server.pocket.scenes import Scene

FOUND_BELOW = 2
"""Encoder layers that finding a named thing may take: half of them, the other half compares."""
COUNT_ANSWERS = slice(0, len(NUMBERS))
TINT_ANSWERS = slice(COUNT_ANSWERS.stop, COUNT_ANSWERS.stop + len(TINTS))
EDGE_ANSWERS = slice(TINT_ANSWERS.stop, TINT_ANSWERS.stop + 4 * EDGE_BINS)


@dataclass(frozen=True)
class Mention:
    """A name's last token, `place` on its text's axis, and the kind that it names."""

    place: int
    kind: str


class Names:
    """Finds the names of kinds, singular and plural, in texts of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._kinds: Mapping[tuple[int, ...], str] = {
            tuple(tokenizer.encode(f" {name}")): kind for kind, of in KINDS.items() for name in (kind, of.plural)
        }
        self._longest = max(map(len, self._kinds))

    def mentions(self, text: Sequence[int]) -> list[Mention]:
        """Names from left to right, the longest one where one begins with another."""
        found, start = [], 0
        while start < len(text):
            lengths = range(min(self._longest, len(text) - start), 0, -1)
            length = next((n for n in lengths if tuple(text[start : start + n]) in self._kinds), 0)
            if length:
                kind = self._kinds[tuple(text[start : start + length])]
                found.append(Mention(start + length - 1, kind))
            start += max(1, length)
        return found


class MentionHead(nn.Module):
    """Reads what the encoder knows of the things that texts name, off its states behind `FOUND_BELOW` layers."""

    def __init__(self, model: OFA) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(model.config.d_model)
        self.answers = nn.Linear(model.config.d_model, EDGE_ANSWERS.stop)
        self._states: list[Tensor] = []
        model.encoder.layers[FOUND_BELOW - 1].register_forward_hook(lambda _, __, states: self._states.append(states))

    def loss(self, places: Tensor, truths: Sequence[tuple[str, Scene]]) -> Tensor:
        """Mean losses of counts, tints and edges in the last pass, added up.

        `places` (M,) are the mentions' places on the batch's flat axis; edges and tint are asked of what is there once.
        """
        states = self._states.pop()
        self._states.clear()
        answers = self.answers(self.norm(states[places])).float()
        things = [scene.of_kind(kind) for kind, scene in truths]
        counts = torch.tensor([len(found) for found in things], dtype=torch.long)
        single = torch.tensor([len(found) == 1 for found in things], dtype=torch.bool)
        tints = [found[0].tint if len(found) == 1 else None for found in things]
        tint = torch.tensor([UNTINTED if t is None else list(TINTS).index(t) for t in tints], dtype=torch.long)
        counted = F.cross_entropy(answers[:, COUNT_ANSWERS], counts, reduction="sum")
        tinted = F.cross_entropy(answers[:, TINT_ANSWERS], tint, ignore_index=UNTINTED, reduction="sum")
        boxes = torch.tensor([found[0].box for found in things if len(found) == 1]).view(-1, 4)
        edges = answers[single][:, EDGE_ANSWERS].unflatten(1, (4, EDGE_BINS))
        spread = -(edge_targets(boxes) * edges.log_softmax(-1)).sum()
        tinted_things = int((tint != UNTINTED).sum())
        total: Tensor = counted / max(1, len(counts)) + tinted / max(1, tinted_things) + spread / max(1, 4 * len(boxes))
        return total
