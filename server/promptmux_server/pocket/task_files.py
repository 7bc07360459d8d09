"""Tasks about scenes as files that `promptmux train` reads: `python -m promptmux_server.pocket.task_files --help`.

Owns which scenes are learned from, which choose the best step, and which are kept for the final score. A task's samples
of one scene depend on the scene alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.scenes import Scene
from promptmux_server.pocket.tasks import TASKS, SceneTask
from promptmux_server.training.data.fields import TARGET_FIELD


@dataclass(frozen=True)
class Cut:
    """Scenes [first, last) of a data set, from which at most `samples` lines of a task are made."""

    name: str
    first: int
    last: int
    per_scene: int
    samples: int


LEARNED = Cut("train", 0, 38_000, 4, 16_000)
CHOSEN_BY = Cut("validation", 38_000, 40_000, 1, 400)
HELD_OUT = Cut("heldout", 0, 4_000, 1, 2_000)


def lines_of(task: SceneTask, data: SceneDataset, cut: Cut) -> Iterator[tuple[int, dict[str, Any]]]:
    """(scene, line) of a cut, until it is full; a question that was asked of the same scene before is left out."""
    made = 0
    for index in range(cut.first, min(cut.last, len(data))):
        for line in _lines_about(task, data[index][1], f"{cut.name}/{index:05d}.png", cut.per_scene):
            if made == cut.samples:
                return
            made += 1
            yield index, line


def _lines_about(task: SceneTask, scene: Scene, image: str, count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{task.name} {scene.seed}")
    asked = set()
    for _ in range(count):
        sample = task.sample(scene, rng)
        if sample is None or sample.text in asked:
            continue
        asked.add(sample.text)
        target = list(sample.target) if isinstance(sample.target, tuple) else sample.target
        text = {} if sample.text is None else {"text": sample.text}
        yield {"image": image, **text, TARGET_FIELD[task.kind]: target}


def write_task_files(data: SceneDataset, cut: Cut, out: Path) -> None:
    """`out/TASK.CUT.jsonl` for all tasks, and the pictures that they name, written anew: scenes may be others now."""
    (out / cut.name).mkdir(parents=True, exist_ok=True)
    written: set[int] = set()
    for task in TASKS.values():
        with (out / f"{task.name}.{cut.name}.jsonl").open("w") as file:
            for index, line in lines_of(task, data, cut):
                file.write(json.dumps(line) + "\n")
                if index not in written:
                    Image.fromarray(data[index][0]).save(out / line["image"])
                    written.add(index)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the shipped tasks' data as JSON lines and pictures.")
    parser.add_argument("--train", type=Path, default=Path("var/pocket/train"))
    parser.add_argument("--heldout", type=Path, default=Path("var/pocket/heldout"))
    parser.add_argument("--out", type=Path, default=Path("var/pocket/tasks"))
    arguments = parser.parse_args()
    train, heldout = SceneDataset(arguments.train), SceneDataset(arguments.heldout)
    for data, cut in ((train, LEARNED), (train, CHOSEN_BY), (heldout, HELD_OUT)):
        write_task_files(data, cut, arguments.out)


if __name__ == "__main__":
    main()
