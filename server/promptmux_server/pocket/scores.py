"""How well a shipped task is answered on held-out scenes, through the engine that serves it."""

from __future__ import annotations

import random
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from promptmux_server.backbone.images import from_array
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.engine.offline import engine_over
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.request import Answer, Request
from promptmux_server.errors import NoBoxFound
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.samples import ENTAILMENT_LABELS, TaskName, TaskSample, task_sample
from promptmux_server.pocket.scenes import Box, Scene
from promptmux_server.tasks import AnswerOutput, BoxOutput, CaptionOutput, LabelOutput

METRICS: dict[TaskName, str] = {
    "scene-caption": "objects_named",
    "scene-vqa": "accuracy",
    "scene-entailment": "accuracy",
    "scene-grounding": "acc@0.5",
}
WAITING = 128
"""Requests submitted before the first answer is awaited."""


@dataclass(frozen=True)
class TaskScore:
    """`value` is the mean of the metric over `n` items; `exact` is the share of answers equal to the truth."""

    metric: str
    value: float
    exact: float
    n: int

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4f}, exact {self.exact:.4f}, n = {self.n}"


def score_task(
    task: TaskName, model: OFA, tokenizer: Tokenizer, fingerprint: str, prompts: Path, data: SceneDataset, scenes: int
) -> TaskScore:
    """Ask one question about each of the first scenes of a held-out set; the questions are the same every time."""
    values, exact = [], []
    options = EngineOptions(queue_size=2 * WAITING, max_batch=64)
    with engine_over(prompts, model, tokenizer, fingerprint, options) as engine:
        for start in range(0, scenes, WAITING):
            items = [task_item(task, data, index) for index in range(start, min(start + WAITING, scenes))]
            asked = [(item, engine.submit(item.request)) for item in items]
            for item, future in asked:
                value, equal = _score(item.scene, item.sample, future)
                values.append(value)
                exact.append(equal)
    return TaskScore(METRICS[task], sum(values) / len(values), sum(exact) / len(exact), len(values))


@dataclass(frozen=True)
class TaskItem:
    """One question about one scene, with the truth and as the engine is asked."""

    scene: Scene
    sample: TaskSample
    request: Request


def task_item(task: TaskName, data: SceneDataset, index: int) -> TaskItem:
    """What a task is asked about a scene of a data set: the same every time."""
    pixels, scene = data[index]
    sample = task_sample(task, scene, random.Random(scene.seed))
    request = Request(
        request_id=str(index),
        task=task,
        text=sample.text,
        image=from_array(pixels),
        deadline=time.monotonic() + 600.0,
    )
    return TaskItem(scene, sample, request)


def _score(scene: Scene, sample: TaskSample, future: Future[Answer]) -> tuple[float, bool]:
    """(metric, whether the answer is the truth exactly)."""
    try:
        output = future.result().output
    except NoBoxFound:
        return 0.0, False
    if isinstance(output, BoxOutput):
        assert not isinstance(sample.target, str)
        overlap = intersection_over_union(output.box, sample.target)
        return float(overlap >= 0.5), overlap > 0.95
    truth = str(sample.target).strip()
    if isinstance(output, CaptionOutput):
        kinds = {o.kind for o in scene.objects}
        return sum(kind in output.text for kind in kinds) / len(kinds), output.text == truth
    if isinstance(output, LabelOutput):
        return float(output.label == ENTAILMENT_LABELS[truth]), output.label == ENTAILMENT_LABELS[truth]
    assert isinstance(output, AnswerOutput)
    return float(output.text == truth), output.text == truth


def intersection_over_union(a: Box, b: Box) -> float:
    """Overlap of two boxes, 1e-6 in the denominator (ofa-spec 9.5)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / (union + 1e-6)
