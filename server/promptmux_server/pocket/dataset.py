"""Scenes rendered once and kept on disk: `python -m promptmux_server.pocket.dataset --help`.

A folder holds shards of 1,000 scenes: `NNNN.npy` (pictures, uint8) and `NNNN.jsonl` (truth). A shard is renamed into
place when whole, so rendering can be killed and started again.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from promptmux_server.pocket.art import FluentArt
from promptmux_server.pocket.scenes import Scene, SceneObject, Split, compose

SHARD = 1000

Pixels = npt.NDArray[np.uint8]


def render_shard(
    folder: Path, shard: int, split: Split, art_folder: Path, *, novel: bool = False, shapes: float = 0.0
) -> None:
    """Render scenes [shard * SHARD, (shard + 1) * SHARD) unless the shard is there already."""
    target = folder / f"{shard:04d}"
    if target.with_suffix(".npy").exists():
        return
    art = FluentArt(art_folder)
    made = [compose(shard * SHARD + i, split, art, novel=novel, shapes=shapes) for i in range(SHARD)]
    target.with_suffix(".jsonl").write_text("".join(json.dumps(asdict(scene)) + "\n" for scene, _ in made))
    unfinished = folder / f"{shard:04d}.part.npy"
    np.save(unfinished, np.stack([np.asarray(picture) for _, picture in made]))
    unfinished.rename(target.with_suffix(".npy"))


class SceneDataset:
    """Rendered scenes by number; pictures are read from disk as needed."""

    def __init__(self, folder: Path) -> None:
        shards = sorted(path for path in folder.glob("*.npy") if path.suffixes == [".npy"])
        if not shards:
            raise FileNotFoundError(f"no rendered scenes in {folder}: run `make scenes` first")
        self._pictures = [np.load(path, mmap_mode="r") for path in shards]
        self._scenes = [_read_scenes(path.with_suffix(".jsonl")) for path in shards]

    def __len__(self) -> int:
        return len(self._scenes) * SHARD

    def __getitem__(self, index: int) -> tuple[Pixels, Scene]:
        """Picture (128, 128, 3) uint8 and truth."""
        shard, offset = divmod(index, SHARD)
        return self._pictures[shard][offset], self._scenes[shard][offset]


def _read_scenes(path: Path) -> list[Scene]:
    scenes = []
    for line in path.read_text().splitlines():
        raw = json.loads(line)
        objects = tuple(SceneObject(o["kind"], tuple(o["box"]), o["tint"]) for o in raw["objects"])
        scenes.append(Scene(raw["seed"], raw["background"], objects))
    return scenes


def main() -> None:
    parser = argparse.ArgumentParser(description="Render scenes to disk.")
    parser.add_argument("--split", choices=get_args(Split), required=True)
    parser.add_argument("--shards", type=int, required=True, help=f"how many times {SHARD} scenes")
    parser.add_argument("--novel", action="store_true", help="use the held-out kinds only")
    parser.add_argument("--shapes", type=float, default=0.0, help="share of plain shapes among the things")
    parser.add_argument("--art", type=Path, default=Path("var/art/assets"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.workers) as pool:
        jobs = [
            pool.submit(
                render_shard,
                arguments.out,
                shard,
                arguments.split,
                arguments.art,
                novel=arguments.novel,
                shapes=arguments.shapes,
            )
            for shard in range(arguments.shards)
        ]
        for job in jobs:
            job.result()


if __name__ == "__main__":
    main()
