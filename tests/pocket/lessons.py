"""A stem's lesson that nobody gave: for tests of what follows it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from promptmux_server.backbone.vision import VisionStem
from promptmux_server.pocket.patches import ANSWERS
from promptmux_server.pocket.recipe import pocket_config


def untaught(folder: Path) -> Path:
    """The file that such a lesson leaves."""
    torch.manual_seed(0)
    config = pocket_config(500)
    stem, head = VisionStem(config, folded=False), nn.Linear(config.image_feature_dim, ANSWERS)
    tensors = stem.state_dict() | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / "stem.safetensors")
    return folder / "stem.safetensors"
