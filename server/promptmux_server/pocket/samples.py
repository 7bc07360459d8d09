"""Supervised texts about scenes: what `pocket` is pretrained on, and the four tasks its shipped prompts answer.

The two never share a wording: pretraining asks " where is the dog?", the grounding task " which region does the text
" the dog " describe?". That difference is what a prompt has to learn. Knows no tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.questions import NUMBERS, question_about
from promptmux_server.pocket.scenes import COLOURS, Box, Scene
from promptmux_server.pocket.statements import (
    describe,
    groundless_about,
    referring_expression,
    statement_about,
    unknowable_about,
)

Part = str | Box
"""A text with its leading blank, or a box that becomes four location tokens."""

TaskName = Literal["scene-caption", "scene-vqa", "scene-entailment", "scene-grounding"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)

INSTRUCTIONS: dict[TaskName, str] = {
    "scene-caption": " describe the scene.",
    "scene-vqa": " {text}",
    "scene-entailment": ' can image imply " {text} "?',
    "scene-grounding": ' which region does the text " {text} " describe?',
}
"""Instruction templates of the shipped tasks, as their manifests carry them."""

ENTAILMENT_LABELS = {"yes": "entailment", "no": "contradiction", "maybe": "neutral"}


@dataclass(frozen=True)
class Sample:
    """One supervised text of pretraining: source and target parts, and the kind of question it is."""

    kind: str
    source: tuple[Part, ...]
    target: tuple[Part, ...]


@dataclass(frozen=True)
class TaskSample:
    """One item of a shipped task: what a user sends as text (None for captions), and the right answer."""

    task: TaskName
    text: str | None
    target: Part


def vqa_answers() -> tuple[str, ...]:
    """The closed answer set of scene-vqa."""
    return ("yes", "no", *NUMBERS, *COLOURS, *KINDS)


def pretrain_samples(scene: Scene, rng: random.Random, count: int, *, described: bool = True) -> list[Sample]:
    """`count` samples. `described` begins with a caption and a list of all boxes, the densest supervision of a picture;
    otherwise with one of the two, which leaves more room for questions."""
    first = [_caption(scene, rng), _detection(scene)]
    if not described:
        first = [rng.choice(first)]
    makers: tuple[Callable[[Scene, random.Random], Sample], ...] = (_question, _where, _matching, _region)
    rest = rng.choices(makers, weights=(4, 2, 3, 1), k=count - len(first))
    return [*first, *(maker(scene, rng) for maker in rest)]


def _caption(scene: Scene, rng: random.Random) -> Sample:
    if rng.random() < 0.5:
        return Sample("caption", (" what does the image describe?",), (f" {describe(scene)} on {scene.background}",))
    return Sample("caption", (" what is in the image?",), (f" {describe(scene)}",))


def _detection(scene: Scene) -> Sample:
    target = [part for o in scene.left_to_right for part in (f" {o.kind}", o.box)]
    return Sample("detection", (" what is where?",), tuple(target))


def _region(scene: Scene, rng: random.Random) -> Sample:
    thing = rng.choice(scene.objects)
    return Sample("region", (" what is in the region?", thing.box), (f" {KINDS[thing.kind].with_article}",))


def _where(scene: Scene, rng: random.Random) -> Sample:
    expression, box = referring_expression(scene, rng)
    return Sample("where", (f" where is {expression}?",), (box,))


def _matching(scene: Scene, rng: random.Random) -> Sample:
    statement, truth = statement_about(scene, rng)
    return Sample("matching", (f' does the image describe " {statement} "?',), (" yes" if truth else " no",))


def _question(scene: Scene, rng: random.Random) -> Sample:
    question, answer, sentence = question_about(scene, rng)
    if rng.random() < 0.5:
        return Sample("sentence", (f" question: {question} answer in full.",), (f" {sentence}",))
    return Sample("word", (f" question: {question} answer in a word.",), (f" {answer}",))


def task_sample(task: TaskName, scene: Scene, rng: random.Random) -> TaskSample:
    """One item of a shipped task about a scene."""
    if task == "scene-caption":
        return TaskSample(task, None, f" {describe(scene)}, the background is {scene.background}")
    if task == "scene-vqa":
        question, answer, _ = question_about(scene, rng)
        return TaskSample(task, question, f" {answer}")
    if task == "scene-grounding":
        return TaskSample(task, *referring_expression(scene, rng))
    hypothesis, answer = _hypothesis(scene, rng)
    return TaskSample(task, hypothesis, f" {answer}")


def _hypothesis(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A third each of true, false and undecidable; one false hypothesis in four merely names an absent thing."""
    label = rng.choice(("yes", "no", "maybe"))
    if label == "maybe":
        return unknowable_about(scene, rng), label
    if label == "no" and rng.random() < 0.25:
        return groundless_about(scene, rng), label
    while True:
        statement, truth = statement_about(scene, rng)
        if truth == (label == "yes"):
            return statement, label


def corpus(scenes: Iterator[Scene], rng: random.Random) -> Iterator[str]:
    """All texts about scenes, for training a tokenizer."""
    for scene in scenes:
        for sample in pretrain_samples(scene, rng, 6):
            yield from (part for part in (*sample.source, *sample.target) if isinstance(part, str))
        for task in TASKS:
            item = task_sample(task, scene, rng)
            yield INSTRUCTIONS[task].format(text=item.text)
            if isinstance(item.target, str):
                yield item.target
