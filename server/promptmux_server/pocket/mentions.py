"""What the encoder should know of each thing that a text names: how many there are, where it is, which colour, and how
far from it the thing stands that was named before.

A yes or a no says little about which of the things that a question names was looked up wrongly; here every name is told
what it stands for: what one thing is at the layer below which it must have been found, and how two compare behind the
last. The head that reads it serves pretraining only. Knows no sample and no loop.
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
from promptmux_server.pocket.scenes import SIDE, Scene, SceneObject

FOUND_BELOW = 2
"""Encoder layers that finding a named thing may take: half of them, the other half compares."""
COUNT_ANSWERS = slice(0, len(NUMBERS))
TINT_ANSWERS = slice(COUNT_ANSWERS.stop, COUNT_ANSWERS.stop + len(TINTS))
APART_BINS = EDGE_BINS
UNKNOWN = (0.0, 0.0, 0.0, 0.0)
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


@dataclass(frozen=True)
class Named:
    """A kind that a text about a scene names, its `place` on the batch's flat axis, and the kind it named before."""

    place: int
    kind: str
    scene: Scene
    before: str | None

    @property
    def thing(self) -> SceneObject | None:
        """What the name stands for, where only one thing is called so."""
        return single(self.scene, self.kind)

    @property
    def apart(self) -> tuple[float, float] | None:
        """Pixels from the thing named before to this one, right and down; None unless each name stands for one."""
        other = None if self.before is None else single(self.scene, self.before)
        if self.thing is None or other is None or other is self.thing:
            return None
        (x, y), (left, top) = self.thing.centre, other.centre
        return x - left, y - top


def single(scene: Scene, kind: str) -> SceneObject | None:
    found = scene.of_kind(kind)
    return found[0] if len(found) == 1 else None


class MentionHead(nn.Module):
    """Reads what the encoder knows of the things that texts name off the states of its last pass."""

    def __init__(self, model: OFA) -> None:
        super().__init__()
        width, layers = model.config.d_model, model.encoder.layers
        self.found_norm, self.compared_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.found = nn.Linear(width, EDGE_ANSWERS.stop)
        self.compared = nn.Linear(width, 2 * APART_BINS)
        self._states: dict[str, Tensor] = {}
        for name, layer in (("found", layers[FOUND_BELOW - 1]), ("compared", layers[-1])):
            layer.register_forward_hook(lambda _, __, states, name=name: self._states.update({name: states}))

    def loss(self, named: Sequence[Named]) -> Tensor:
        """Mean losses of counts, tints, edges and distances, added up; the first is asked of every name, the others of
        names that stand for one thing."""
        found = self.found(self.found_norm(self._states["found"][_places(named)])).float()
        counts = torch.tensor([name.scene.count(name.kind) for name in named], dtype=torch.long)
        tints = [None if name.thing is None else name.thing.tint for name in named]
        tint = torch.tensor([UNTINTED if t is None else list(TINTS).index(t) for t in tints], dtype=torch.long)
        boxes = torch.tensor([UNKNOWN if name.thing is None else name.thing.box for name in named]).view(-1, 4)
        edges = found[:, EDGE_ANSWERS].unflatten(1, (4, EDGE_BINS))
        losses = (
            F.cross_entropy(found[:, COUNT_ANSWERS], counts, reduction="none"),
            F.cross_entropy(found[:, TINT_ANSWERS], tint, ignore_index=UNTINTED, reduction="none")[tint != UNTINTED],
            _spread(edges, edge_targets(boxes))[boxes[:, 2] > 0],
            self._comparisons([name for name in named if name.apart is not None]),
        )
        return torch.stack([loss.sum() / max(1, len(loss)) for loss in losses]).sum()

    def _comparisons(self, pairs: Sequence[Named]) -> Tensor:
        """Losses (M,) of the distances between the things of each pair, told as bells over bins."""
        said = self.compared(self.compared_norm(self._states["compared"][_places(pairs)])).float()
        apart = torch.tensor([pair.apart for pair in pairs]).view(-1, 2)
        # Distances reach from -SIDE to SIDE: halved and shifted they are edges.
        return _spread(said.unflatten(1, (2, APART_BINS)), edge_targets((apart + SIDE) / 2))


def _places(named: Sequence[Named]) -> Tensor:
    return torch.tensor([name.place for name in named], dtype=torch.long)


def _spread(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of each row's distributions, (M, n, bins) -> (M,)."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean(-1)
