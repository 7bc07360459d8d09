"""The truth about patches: what each shows, in which tint, and where that begins and ends. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.colours import COLOURS, TINTS
from promptmux_server.pocket.scenes import SIDE, Scene
from promptmux_server.pocket.shapes import SHAPES

PATCH = 16
GRID = 8
WORDS: tuple[str, ...] = (*KINDS, *COLOURS)
"""What a patch can be named: the kind whose box holds its centre, or the background's colour."""
EDGE_BINS = 32
"""Classes of one edge of a box, 4 pixels each; targets spread over their neighbours, so that near misses count less."""
WORD_ANSWERS = slice(0, len(WORDS))
TINT_ANSWERS = slice(WORD_ANSWERS.stop, WORD_ANSWERS.stop + len(TINTS))
EDGE_ANSWERS = slice(TINT_ANSWERS.stop, TINT_ANSWERS.stop + 4 * EDGE_BINS)
ANSWERS = EDGE_ANSWERS.stop + 1
"""Outputs of the lesson's head: words, a shape's tint, the four edges, whether the thing's centre lies in the patch."""
UNTINTED = -100
SHAPES_WEIGH = 3.0
"""Of a plain shape beside other things: small ones are the last to be told apart."""


@dataclass(frozen=True)
class PatchTruth:
    """Labels of all patches of a picture, row-major: `word` and `tint` (64,) int64, `edges` (64, 4) pixels, `centre`
    (64,) float.

    A patch of background has its own edges; what is no plain shape is UNTINTED. Where boxes overlap, the last thing
    painted counts.
    """

    word: Tensor
    tint: Tensor
    edges: Tensor
    centre: Tensor


def patch_truth(scene: Scene) -> PatchTruth:
    word = torch.full((GRID, GRID), WORDS.index(scene.background))
    tint = torch.full((GRID, GRID), UNTINTED)
    starts = torch.arange(GRID) * float(PATCH)
    x, y = starts[None].expand(GRID, GRID), starts[:, None].expand(GRID, GRID)
    edges = torch.stack([x, y, x + PATCH, y + PATCH], -1)
    centre = torch.zeros(GRID, GRID)
    middles = starts + PATCH / 2
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        inside = ((middles >= y0) & (middles < y1))[:, None] & ((middles >= x0) & (middles < x1))[None]
        word[inside] = WORDS.index(thing.kind)
        tint[inside] = UNTINTED if thing.tint is None else list(TINTS).index(thing.tint)
        edges[inside] = torch.tensor(thing.box)
        centre[inside] = 0.0
        column, row = (min(GRID - 1, int(c // PATCH)) for c in thing.centre)
        centre[row, column] = 1.0
    return PatchTruth(word.flatten(), tint.flatten(), edges.flatten(0, 1), centre.flatten())


def edge_targets(edges: Tensor) -> Tensor:
    """Edges (..., 4) in pixels -> distributions over bins (..., 4, EDGE_BINS), a bell one bin wide."""
    bins = (torch.arange(EDGE_BINS) + 0.5) * (SIDE / EDGE_BINS)
    distance = (edges[..., None] - bins) / (SIDE / EDGE_BINS)
    return (-0.5 * distance.square()).softmax(-1)


def lesson_losses(answers: Tensor, truths: list[PatchTruth]) -> dict[str, Tensor]:
    """Mean losses of words, tints, edges and centres; answers are (B, 64, ANSWERS) float32."""
    answers = answers.flatten(0, 1)
    tint = torch.cat([t.tint for t in truths])
    tinted = F.cross_entropy(answers[:, TINT_ANSWERS], tint, ignore_index=UNTINTED, reduction="sum")
    weights = torch.tensor([SHAPES_WEIGH if word in SHAPES else 1.0 for word in WORDS])
    edge_logits = answers[:, EDGE_ANSWERS].unflatten(1, (4, EDGE_BINS)).flatten(0, 1)
    return {
        "word": F.cross_entropy(answers[:, WORD_ANSWERS], torch.cat([t.word for t in truths]), weights),
        "tint": tinted / max(1, int((tint != UNTINTED).sum())),
        "edge": F.cross_entropy(edge_logits, edge_targets(torch.cat([t.edges for t in truths])).flatten(0, 1)),
        "centre": F.binary_cross_entropy_with_logits(answers[:, -1], torch.cat([t.centre for t in truths])),
    }


@torch.no_grad()
def lesson_measures(answers: Tensor, truths: list[PatchTruth]) -> dict[str, float]:
    """What a log says of a batch: shares of patches named rightly, and how far expected edges are off, in pixels."""
    word, edges = torch.cat([t.word for t in truths]), torch.cat([t.edges for t in truths])
    answers = answers.flatten(0, 1)
    right = (answers[:, WORD_ANSWERS].argmax(1) == word).float()
    shown = word < len(KINDS)
    bins = (torch.arange(EDGE_BINS) + 0.5) * (SIDE / EDGE_BINS)
    expected = (answers[:, EDGE_ANSWERS].unflatten(1, (4, EDGE_BINS)).softmax(-1) * bins).sum(-1)
    measures = {
        "kinds": right[shown].mean(),
        "colours": right[~shown].mean(),
        "edges_px": (expected - edges)[shown].abs().mean(),
    }
    return {name: round(float(value), 4) for name, value in measures.items()}
