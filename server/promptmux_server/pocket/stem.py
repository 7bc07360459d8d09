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
from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.mixture import to_pixels
from promptmux_server.pocket.recipe import initialise, pocket_config
from promptmux_server.pocket.scenes import COLOURS, SIDE, Scene

PATCH = 16
GRID = 8
WORDS: tuple[str, ...] = (*KINDS, *COLOURS)
"""What a patch can be named: the kind whose box holds its centre, or the background's colour."""
EDGE_BINS = 32
"""Classes of one edge of a box, 4 pixels each; targets spread over their neighbours, so that near misses count less."""
ANSWERS = len(WORDS) + 4 * EDGE_BINS + 1
"""Outputs of the lesson's head: words, the four edges, and whether the thing's centre lies in the patch."""
BATCH = 32
LEARNING_RATE = 1.5e-3
SEED = 20261124
LOG_EVERY = 50


@dataclass(frozen=True)
class PatchTruth:
    """Labels of all patches of a picture, row-major: `word` (64,) int64, `edges` (64, 4) pixels, `centre` (64,) float.

    A patch of background has its own edges. Where boxes overlap, the last thing painted counts.
    """

    word: Tensor
    edges: Tensor
    centre: Tensor


def patch_truth(scene: Scene) -> PatchTruth:
    word = torch.full((GRID, GRID), WORDS.index(scene.background))
    starts = torch.arange(GRID) * float(PATCH)
    x, y = starts[None].expand(GRID, GRID), starts[:, None].expand(GRID, GRID)
    edges = torch.stack([x, y, x + PATCH, y + PATCH], -1)
    centre = torch.zeros(GRID, GRID)
    middles = starts + PATCH / 2
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        inside = ((middles >= y0) & (middles < y1))[:, None] & ((middles >= x0) & (middles < x1))[None]
        word[inside] = WORDS.index(thing.kind)
        edges[inside] = torch.tensor(thing.box)
        centre[inside] = 0.0
        column, row = (min(GRID - 1, int(c // PATCH)) for c in thing.centre)
        centre[row, column] = 1.0
    return PatchTruth(word.flatten(), edges.flatten(0, 1), centre.flatten())


def edge_targets(edges: Tensor) -> Tensor:
    """Edges (..., 4) in pixels -> distributions over bins (..., 4, EDGE_BINS), a bell one bin wide."""
    bins = (torch.arange(EDGE_BINS) + 0.5) * (SIDE / EDGE_BINS)
    distance = (edges[..., None] - bins) / (SIDE / EDGE_BINS)
    return (-0.5 * distance.square()).softmax(-1)


def lesson_losses(answers: Tensor, truths: list[PatchTruth]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean losses of words, edges and centres; answers are (B, 64, ANSWERS) float32."""
    answers = answers.flatten(0, 1)
    word = F.cross_entropy(answers[:, : len(WORDS)], torch.cat([t.word for t in truths]))
    edge_logits = answers[:, len(WORDS) : -1].unflatten(1, (4, EDGE_BINS)).flatten(0, 1)
    edge = F.cross_entropy(edge_logits, edge_targets(torch.cat([t.edges for t in truths])).flatten(0, 1))
    centre = F.binary_cross_entropy_with_logits(answers[:, -1], torch.cat([t.centre for t in truths]))
    return word, edge, centre


def train_stem(data: SceneDataset, steps: int, log_path: Path) -> tuple[VisionStem, nn.Linear]:
    """Train a stem and the linear head that reads the lesson's answers from its features."""
    torch.manual_seed(SEED)
    config = pocket_config(1000)
    stem, head = VisionStem(config, folded=False), nn.Linear(config.image_feature_dim, ANSWERS)
    initialise(stem)
    stem.train()
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
            sum(losses, start=torch.zeros(())).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if (step + 1) % LOG_EVERY == 0:
                line = {"step": step + 1, **_measures(answers.detach(), truths, losses)}
                log.write(json.dumps({**line, "seconds": round(time.monotonic() - started, 1)}) + "\n")
                log.flush()
    return stem, head


def _measures(answers: Tensor, truths: list[PatchTruth], losses: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """What the log says of a batch: shares of patches named rightly, and the three losses."""
    word = torch.cat([t.word for t in truths])
    right = (answers.flatten(0, 1)[:, : len(WORDS)].argmax(1) == word).float()
    shown = word < len(KINDS)
    measures = {"kinds": right[shown].mean(), "colours": right[~shown].mean()}
    measures |= dict(zip(("word", "edge", "centre"), losses, strict=True))
    return {name: round(float(value.detach()), 4) for name, value in measures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach the vision stem what each patch shows and where.")
    parser.add_argument("--data", type=Path, default=Path("var/pocket/train"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("var/pocket/stem.safetensors"))
    arguments = parser.parse_args()
    stem, head = train_stem(SceneDataset(arguments.data), arguments.steps, arguments.out.with_suffix(".jsonl"))
    tensors = stem.state_dict() | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, arguments.out)


if __name__ == "__main__":
    main()
