"""The stem's first lesson: what each patch shows, and where it begins and ends.

Learnt end to end, naming stays on a plateau for thousands of steps (docs/log.md), because a sentence says little about
which pixels earned it; and since OFA adds no positions to its embeddings, a patch can only say where it is if its
features do. Patch labels are exact here, and an hour of them gives the stem features that the encoder can read at once.
A run can be killed and started again with the same command. `python -m promptmux_server.pocket.stem --help`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from promptmux_server.backbone.assemble import serving_dtype
from promptmux_server.backbone.vision import VisionStem, channels_last
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.pocket import checkpoints
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.mixture import to_pixels
from promptmux_server.pocket.patches import ANSWERS, lesson_losses, lesson_measures, patch_truth
from promptmux_server.pocket.recipe import STEM, initialise, pocket_config
from promptmux_server.pocket.scenes import SIDE, Scene
from promptmux_server.training.curve import Curve

STEPS = 4000
BATCH = 64
LEARNING_RATE = 2e-3
WARMUP_STEPS = 250
SEED = 20261124
LOG_EVERY = 50
CHECKPOINT_EVERY = 250


def new_stem(begin: Path | None = None) -> tuple[VisionStem, nn.Linear]:
    """A stem, new or a backbone's, and a new head for the lesson's answers."""
    torch.manual_seed(SEED)
    config = pocket_config(1000) if begin is None else load_backbone(begin).config
    stem, head = VisionStem(config, folded=False), nn.Linear(config.image_feature_dim, ANSWERS)
    initialise(stem)
    if begin is not None:
        tensors = load_backbone(begin).tensors
        found = {name.removeprefix(STEM): t.float() for name, t in tensors.items() if name.startswith(STEM)}
        stem.load_state_dict(found)
    return stem, head


def train_stem(stem: VisionStem, head: nn.Linear, data: SceneDataset, steps: int, out: Path) -> None:
    """Train a stem, unless it is frozen, and the linear head that reads the lesson's answers from its features.

    Leaves both in `out`; its log and checkpoint lie beside it.
    """
    stem.train(stem.conv1.weight.requires_grad)
    channels_last(stem)
    optimizer = torch.optim.AdamW([*stem.parameters(), *head.parameters()], lr=LEARNING_RATE, weight_decay=1e-2)
    modules, kept = {"stem": stem, "head": head}, out.with_suffix(".checkpoint")
    first = checkpoints.restore(kept, modules, optimizer)
    Curve(out.with_suffix(".jsonl")).go_back(first)
    started = time.monotonic()
    with out.with_suffix(".jsonl").open("a") as log:
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min((step + 1) / WARMUP_STEPS, 1.0) * (1.0 - step / steps)
            rng = random.Random(SEED + step)
            pictures, scenes = zip(*(_picture(data, rng) for _ in range(BATCH)), strict=True)
            pixels = to_pixels(torch.stack(pictures)).contiguous(memory_format=torch.channels_last)
            truths = [patch_truth(scene) for scene in scenes]
            with torch.autocast("cpu", torch.bfloat16, enabled=serving_dtype("cpu") is torch.bfloat16):
                features = stem(pixels)  # (B, C, 8, 8)
                answers = head(features.flatten(2).transpose(1, 2)).float()  # (B, 64, ANSWERS)
            losses = lesson_losses(answers, truths)
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % LOG_EVERY == 0:
                line = {"step": step + 1, **lesson_measures(answers, truths)}
                line |= {name: round(float(loss.detach()), 4) for name, loss in losses.items()}
                log.write(json.dumps({**line, "seconds": round(time.monotonic() - started, 1)}) + "\n")
                log.flush()
            if (step + 1) % CHECKPOINT_EVERY == 0:
                checkpoints.save(kept, step + 1, modules, optimizer)
    tensors = stem.state_dict() | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)


def _picture(data: SceneDataset, rng: random.Random) -> tuple[Tensor, Scene]:
    """A picture and its truth, mirrored as often as not: things are, too, so it could have been composed like that."""
    image, scene = data[rng.randrange(len(data))]
    if rng.random() < 0.5:
        return torch.from_numpy(image.copy()), scene
    return torch.from_numpy(image[:, ::-1].copy()), mirrored(scene)


def mirrored(scene: Scene) -> Scene:
    """The scene that a picture shows whose left and right are exchanged."""
    boxes = ((SIDE - o.box[2], o.box[1], SIDE - o.box[0], o.box[3]) for o in scene.objects)
    return replace(scene, objects=tuple(replace(o, box=box) for o, box in zip(scene.objects, boxes, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach the vision stem what each patch shows and where.")
    parser.add_argument("--data", type=Path, default=Path("var/pocket/train"))
    parser.add_argument("--begin", type=Path, help="a backbone directory whose stem to go on from")
    parser.add_argument("--head-only", action="store_true", help="leave the stem as it is, and learn to read it")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("var/pocket/stem.safetensors"))
    arguments = parser.parse_args()
    stem, head = new_stem(arguments.begin)
    stem.requires_grad_(not arguments.head_only)
    train_stem(stem, head, SceneDataset(arguments.data), arguments.steps, arguments.out)


if __name__ == "__main__":
    main()
