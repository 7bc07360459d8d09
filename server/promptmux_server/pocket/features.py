"""What the taught stem sees in every training picture, computed once and kept on disk for the whole pretraining.

The stem is frozen after its lesson, and a picture costs it as much as twenty texts cost the rest of the model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from promptmux_server.backbone.vision import VisionStem, channels_last
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.mixture import to_pixels

CHUNK = 250

Features = npt.NDArray[np.float16]


@torch.no_grad()
def stem_features(stem: VisionStem, data: SceneDataset, count: int, path: Path) -> Features:
    """Features (count, N, C) float16 of the first pictures, read from `path` if they are there already."""
    if not path.exists():
        stem.eval()
        channels_last(stem)
        unfinished = path.with_suffix(".part.npy")
        kept: Features | None = None
        for start in range(0, count, CHUNK):
            seen = see(stem, data, range(start, min(start + CHUNK, count))).half().numpy()
            if kept is None:
                kept = np.lib.format.open_memmap(unfinished, "w+", np.float16, (count, *seen.shape[1:]))
            kept[start : start + len(seen)] = seen
        unfinished.rename(path)
    features: Features = np.load(path)
    return features


def see(stem: VisionStem, data: SceneDataset, indices: range) -> Tensor:
    """Features (B, N, C) of some pictures, in float32."""
    pixels = to_pixels(torch.stack([torch.from_numpy(data[index][0].copy()) for index in indices]))
    out: Tensor = stem(pixels.contiguous(memory_format=torch.channels_last))  # (B, C, 8, 8)
    return out.flatten(2).transpose(1, 2)
