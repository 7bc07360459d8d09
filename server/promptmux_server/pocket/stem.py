"""The stem's first lesson: name what each patch shows. `python -m promptmux_server.pocket.stem --help`

OFA starts from a ResNet that can already tell things apart. Without that, 1,400 steps of the whole model taught where
things are and not what they are; this stage costs a tenth of the time per picture, since nothing but the stem runs.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from promptmux_server.backbone.vision import VisionStem, channels_last
from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.mixture import to_pixels
from promptmux_server.pocket.recipe import initialise, pocket_config
from promptmux_server.pocket.scenes import Scene

PATCH = 16
GRID = 8
NOTHING = len(KINDS)
"""Class of a patch whose centre lies in no box."""
BATCH = 64
LEARNING_RATE = 2e-3
SEED = 20261124
LOG_EVERY = 50


def patch_labels(scene: Scene) -> Tensor:
    """Kind number of each patch (8, 8) int64: of the last painted thing whose box holds the patch's centre."""
    labels = torch.full((GRID, GRID), NOTHING)
    names = list(KINDS)
    centres = torch.arange(GRID) * PATCH + PATCH / 2
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        inside = ((centres >= y0) & (centres < y1))[:, None] & ((centres >= x0) & (centres < x1))[None]
        labels[inside] = names.index(thing.kind)
    return labels


def train_stem(data: SceneDataset, steps: int, log_path: Path) -> tuple[VisionStem, nn.Linear]:
    """Train a stem and a linear head that names each patch from its features."""
    torch.manual_seed(SEED)
    config = pocket_config(1000)
    stem, head = VisionStem(config, folded=False), nn.Linear(config.image_feature_dim, NOTHING + 1)
    initialise(stem)
    stem.train()
    channels_last(stem)
    optimizer = torch.optim.AdamW([*stem.parameters(), *head.parameters()], lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    with log_path.open("w") as log:
        for step in range(steps):
            rng = random.Random(SEED + step)
            chosen = [data[rng.randrange(len(data))] for _ in range(BATCH)]
            pixels = to_pixels(torch.stack([torch.from_numpy(image.copy()) for image, _ in chosen]))
            labels = torch.stack([patch_labels(scene) for _, scene in chosen]).flatten()
            with torch.autocast("cpu", torch.bfloat16):
                features = stem(pixels.contiguous(memory_format=torch.channels_last))  # (B, C, 8, 8)
                logits = head(features.permute(0, 2, 3, 1).flatten(0, 2)).float()
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if (step + 1) % LOG_EVERY == 0:
                shown = labels != NOTHING
                accuracy = float((logits.argmax(1) == labels)[shown].float().mean())
                line = {"step": step + 1, "loss": round(float(loss.detach()), 4), "accuracy": round(accuracy, 4)}
                log.write(json.dumps({**line, "seconds": round(time.monotonic() - started, 1)}) + "\n")
                log.flush()
    return stem, head


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach the vision stem to name what each patch shows.")
    parser.add_argument("--data", type=Path, default=Path("var/pocket/train"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("var/pocket/stem.safetensors"))
    arguments = parser.parse_args()
    stem, head = train_stem(SceneDataset(arguments.data), arguments.steps, arguments.out.with_suffix(".jsonl"))
    tensors = stem.state_dict() | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, arguments.out)


if __name__ == "__main__":
    main()
