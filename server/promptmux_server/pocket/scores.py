"""How well a prompt answers a task's held-out lines, through the engine that serves it.

Owns what a shipped score means: captions by the things they name, boxes by their overlap, the rest by being right.
Knows no training.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from promptmux_prompts import Kind, Prompt, write_prompt
from promptmux_server.backbone.images import ImageLimits
from promptmux_server.engine.offline import ask_all, engine_over
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.request import Answer, Request
from promptmux_server.errors import NoBoxFound
from promptmux_server.pocket.art import KINDS
from promptmux_server.tasks import AnswerOutput, BoxOutput, CaptionOutput, LabelOutput
from promptmux_server.training.data.fields import TARGET_FIELD
from promptmux_server.training.data.pictures import decoded
from promptmux_server.training.metrics import ENOUGH_OVERLAP, intersection_over_union
from promptmux_server.training.validation import OpenBackbone

METRICS: dict[Kind, str] = {
    "caption": "objects_named",
    "answer": "accuracy",
    "label": "accuracy",
    "box": "acc@0.5",
}
WAITING = 128
"""Requests submitted before the first answer is awaited."""
DEADLINE_S = 600.0


@dataclass(frozen=True)
class TaskScore:
    """`value` is the mean of the metric over `n` lines; `exact` is the share of answers equal to the truth."""

    metric: str
    value: float
    exact: float
    n: int

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4f}, exact {self.exact:.4f}, n = {self.n}"


@dataclass(frozen=True)
class Line:
    """One held-out question with its truth; `image` is the picture's path."""

    text: str | None
    image: Path
    truth: Any

    def request(self, task: str) -> Request:
        limits = ImageLimits()
        picture = decoded(self.image.read_bytes(), limits)
        deadline = time.monotonic() + DEADLINE_S
        return Request(request_id=self.image.stem, task=task, text=self.text, image=picture, deadline=deadline)


def held_out(path: Path, kind: Kind) -> list[Line]:
    """The lines of a file that `task_files` or `easy_vqa` wrote."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [Line(line.get("text"), path.parent / line["image"], line[TARGET_FIELD[kind]]) for line in lines]


def score(prompt: Prompt, backbone: OpenBackbone, lines: list[Line]) -> TaskScore:
    """Ask every line once."""
    values, exact = [], []
    kind: Kind = prompt.manifest.kind
    for line, future in _answers(prompt, backbone, lines):
        value, equal = _worth(line.truth, future)
        values.append(value)
        exact.append(equal)
    return TaskScore(METRICS[kind], sum(values) / len(values), sum(exact) / len(exact), len(values))


def _answers(prompt: Prompt, backbone: OpenBackbone, lines: list[Line]) -> Iterator[tuple[Line, Future[Answer]]]:
    name, options = prompt.manifest.name, EngineOptions(queue_size=2 * WAITING, max_batch=64)
    with TemporaryDirectory(prefix="promptmux-") as folder:
        Path(folder, f"{name}.safetensors").write_bytes(write_prompt(prompt))
        fingerprint = backbone.loaded.fingerprint
        with engine_over(Path(folder), backbone.model, backbone.tokenizer, fingerprint, options) as engine:
            asked = (line.request(name) for line in lines)
            yield from zip(lines, ask_all(engine, asked, waiting=WAITING), strict=True)


def _worth(truth: Any, future: Future[Answer]) -> tuple[float, bool]:
    """(metric, whether the answer is the truth exactly)."""
    try:
        output = future.result().output
    except NoBoxFound:
        return 0.0, False
    if isinstance(output, BoxOutput):
        overlap = intersection_over_union(output.box, tuple(truth))
        return float(overlap >= ENOUGH_OVERLAP), overlap > 0.95
    if isinstance(output, CaptionOutput):
        shown = named_kinds(truth)
        return len(shown & named_kinds(output.text)) / len(shown), output.text == truth
    assert isinstance(output, AnswerOutput | LabelOutput)
    said = output.label if isinstance(output, LabelOutput) else output.text
    return float(said == truth), said == truth


_KIND_OF = {form: kind for kind, described in KINDS.items() for form in (kind, described.plural)}


def named_kinds(caption: str) -> set[str]:
    """The kinds that a caption lists: "a hot dog and two cats on red" names a hot dog, no dog, and cats."""
    parts = re.split(r", | and | on ", caption)
    return {_KIND_OF[name] for part in parts if (name := part.partition(" ")[2]) in _KIND_OF}
