"""The easy-VQA data set as files that `promptmux train` reads; `python -m promptmux_server.pocket.easy_vqa --help`.

Shapes and questions that no scene and no pretraining text has. Its own split for tests is kept for the final score; of
its training pictures, every twentieth chooses the best step.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from promptmux_server.pocket.tasks import PocketTask

EASY_VQA = PocketTask(
    name="easy-vqa",
    kind="answer",
    instruction=" scene: {text} describe in a word.",
    answers=(
        *("yes", "no", "circle", "rectangle", "triangle"),
        *("red", "green", "blue", "yellow", "teal", "brown", "gray", "black"),
    ),
)
EVERY = 20


def questions(data: Path, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(picture, line) of a split of the published files."""
    for text, answer, image in json.loads((data / split / "questions.json").read_text()):
        yield image, {"image": f"easy-vqa/{split}/images/{image}.png", "text": text, "answer": answer}


def write_files(data: Path, out: Path) -> None:
    """`out/easy-vqa.CUT.jsonl` for the three cuts, and all pictures under `out/easy-vqa`."""
    shutil.copytree(data, out / "easy-vqa", dirs_exist_ok=True)
    train, test = list(questions(data, "train")), list(questions(data, "test"))
    cuts = {
        "train": [line for image, line in train if image % EVERY],
        "validation": [line for image, line in train if image % EVERY == 0],
        "heldout": [line for _, line in test],
    }
    for cut, lines in cuts.items():
        (out / f"easy-vqa.{cut}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write easy-VQA (`pip install easy-vqa`) as JSON lines.")
    parser.add_argument("--out", type=Path, default=Path("var/pocket/tasks"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_files(Path(str(files("easy_vqa") / "data")), arguments.out)


if __name__ == "__main__":
    main()
