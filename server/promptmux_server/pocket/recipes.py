"""Training configurations of the tasks: `python -m promptmux_server.pocket.recipes` writes `prompts/recipes`.

Owns the numbers of training; what the tasks ask is theirs (`tasks`, `easy_vqa`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from promptmux_server.backbone.weights import load_backbone
from promptmux_server.pocket import WEIGHTS
from promptmux_server.pocket.easy_vqa import EASY_VQA
from promptmux_server.pocket.tasks import TASKS, PocketTask

FOLDER = Path("prompts/recipes")
POCKET_TASKS: Mapping[str, PocketTask] = {**TASKS, EASY_VQA.name: EASY_VQA}


@dataclass(frozen=True)
class Learning:
    """How long a task learns, the pretraining words for the nearest thing, as whose keys its prompt begins, and how
    many positions that has a side."""

    steps: int
    begin: str
    length: int = 32


LEARNING: Mapping[str, Learning] = {
    "scene-caption": Learning(1200, " what does the image describe?"),
    "scene-vqa": Learning(1200, " question: answer in a word."),
    "scene-entailment": Learning(600, " does the image describe "),
    "scene-grounding": Learning(1000, " where is ?"),
    "scene-counting": Learning(1000, " question: how many things are there? answer in a word."),
    "scene-odd-one-out": Learning(800, " question: what is there? answer in a word."),
    "scene-category": Learning(1000, " question: what is there? answer in a word."),
    "easy-vqa": Learning(3000, " question: answer in a word.", length=64),
}


def trained_in(fingerprint: str) -> Path:
    """Where prompts of a backbone are trained: no other can go on with its checkpoints."""
    return Path("var/pocket/prompts") / fingerprint[:12]


def recipe(task: PocketTask, fingerprint: str) -> str:
    """The configuration of a task's training on the backbone of this fingerprint, as TOML (docs/training.md)."""
    learning = LEARNING[task.name]
    lines = [
        f"# Trains a prompt for {task.name}; written by `python -m promptmux_server.pocket.recipes`.",
        f'output = "../../{trained_in(fingerprint)}/{task.name}"',
        'cache = "../../var/pocket/cache"',
        "",
        "[task]",
        f"name = {json.dumps(task.name)}",
        f"kind = {json.dumps(task.kind)}",
        f"instruction = {json.dumps(task.instruction)}",
    ]
    if task.answers:
        lines.append(f"answers = {json.dumps(task.answers)}")
    if task.decoding:
        lines.append(f"decoding = {{ {', '.join(f'{key} = {value}' for key, value in task.decoding.items())} }}")
    for section, cut in (("[[data.train]]", "train"), ("[data.validation]", "validation")):
        lines += ["", section, f'path = "../../var/pocket/tasks/{task.name}.{cut}.jsonl"']
    lines += [
        "",
        "[prompt]",
        f"encoder_length = {learning.length}",
        f"decoder_length = {learning.length}",
        "dropout = 0.0",
        "",
        "[begin]",
        f"text = {json.dumps(learning.begin)}",
        "",
        "[steps]",
        f"steps = {learning.steps}",
        "learning_rate = 0.05  # above the paper's 0.03: few steps",
        "weight_decay = 0.0",
        "smoothing = 0.0",
        "",
        "[run]",
        "rows = 48",
        f"validate_every = {learning.steps // 4}",
        "validation_samples = 200",
        "",
        "[machine]",
        "threads = 1  # `make library` trains two tasks at a time",
        "",
        "[compute]",
        "autocast = true",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    fingerprint = load_backbone(WEIGHTS).fingerprint
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, task in POCKET_TASKS.items():
        (FOLDER / f"{name}.toml").write_text(recipe(task, fingerprint))


if __name__ == "__main__":
    main()
