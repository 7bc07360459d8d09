"""The stem's first lesson: what each patch shows, and where it begins and ends.

Learnt end to end, naming stays on a plateau for thousands of steps (docs/log.md), because a sentence says little about
which pixels earned it; and since OFA adds no positions to its embeddings, a patch can only say where it is if its
features do. Patch labels are exact here, and a few minutes of them give the stem features that the encoder can read at
once. `python -m promptmux_server.pocket.stem --help`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from promptmux_server.backbone.assemble import serving_dtype
from promptmux_server.backbone.vision import VisionStem, channels_last
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.colours import COLOURS, TINTS
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.mixture import to_pixels
from promptmux_server.pocket.recipe import initialise, pocket_config
from promptmux_server.pocket.scenes import SIDE, Scene

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
BATCH = 64
LEARNING_RATE = 1.5e-3
SEED = 20261124
LOG_EVERY = 50


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
    edge_logits = answers[:, EDGE_ANSWERS].unflatten(1, (4, EDGE_BINS)).flatten(0, 1)
    return {
        "word": F.cross_entropy(answers[:, WORD_ANSWERS], torch.cat([t.word for t in truths])),
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


def new_stem(begin: Path | None = None) -> tuple[VisionStem, nn.Linear]:
    """A stem, new or a backbone's, and a new head for the lesson's answers."""
    torch.manual_seed(SEED)
    config = pocket_config(1000)
    stem, head = VisionStem(config, folded=False), nn.Linear(config.image_feature_dim, ANSWERS)
    initialise(stem)
    if begin is not None:
        tensors, prefix = load_backbone(begin).tensors, "encoder.embed_images."
        found = {name.removeprefix(prefix): t.float() for name, t in tensors.items() if name.startswith(prefix)}
        stem.load_state_dict(found)
    return stem, head


def train_stem(stem: VisionStem, head: nn.Linear, data: SceneDataset, steps: int, log_path: Path) -> None:
    """Train a stem, unless it is frozen, and the linear head that reads the lesson's answers from its features."""
    stem.train(stem.conv1.weight.requires_grad)
    channels_last(stem)
    optimizer = torch.optim.AdamW([*stem.parameters(), *head.parameters()], lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    with log_path.open("w") as log:
        for step in range(steps):
            rng = random.Random(SEED + step)
            chosen = [data[rng.randrange(len(data))] for _ in range(BATCH)]
            pixels = to_pixels(torch.stack([torch.from_numpy(image.copy()) for image, _ in chosen]))
            truths = [patch_truth(scene) for _, scene in chosen]
            with torch.autocast("cpu", torch.bfloat16, enabled=serving_dtype("cpu") is torch.bfloat16):
                features = stem(pixels.contiguous(memory_format=torch.channels_last))  # (B, C, 8, 8)
                answers = head(features.flatten(2).transpose(1, 2)).float()  # (B, 64, ANSWERS)
            losses = lesson_losses(answers, truths)
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if (step + 1) % LOG_EVERY == 0:
                line = {"step": step + 1, **lesson_measures(answers, truths)}
                line |= {name: round(float(loss.detach()), 4) for name, loss in losses.items()}
                log.write(json.dumps({**line, "seconds": round(time.monotonic() - started, 1)}) + "\n")
                log.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach the vision stem what each patch shows and where.")
    parser.add_argument("--data", type=Path, default=Path("var/pocket/train"))
    parser.add_argument("--begin", type=Path, help="a backbone directory whose stem to go on from")
    parser.add_argument("--head-only", action="store_true", help="leave the stem as it is, and learn to read it")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("var/pocket/stem.safetensors"))
    arguments = parser.parse_args()
    stem, head = new_stem(arguments.begin)
    stem.requires_grad_(not arguments.head_only)
    train_stem(stem, head, SceneDataset(arguments.data), arguments.steps, arguments.out.with_suffix(".jsonl"))
    tensors = stem.state_dict() | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, arguments.out)


if __name__ == "__main__":
    main()
