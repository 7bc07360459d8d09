"""The tasks that `pocket`'s shipped prompts answer about scenes: wording, answer sets, and what is right.

No task shares its wording with pretraining (`samples`): that difference is what a prompt has to learn. But the text of
a question stands as many tokens behind the beginning as there: what compares two things reads them by their places,
and a prompt cannot move a text (docs/log.md). The last three ask what pretraining never asked. Knows no tokens and no
files.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from promptmux_prompts import Kind
from promptmux_server.pocket.art import CATEGORIES, KINDS
from promptmux_server.pocket.colours import TINTS
from promptmux_server.pocket.questions import CLEAR_PX, NUMBERS, SIDES, question_about
from promptmux_server.pocket.scenes import Box, Scene
from promptmux_server.pocket.statements import (
    describe,
    groundless_about,
    referring_expression,
    statement_about,
    unknowable_about,
)


@dataclass(frozen=True)
class TaskSample:
    """What a user sends as text (None: nothing but the picture), and the right answer."""

    text: str | None
    target: str | Box


@dataclass(frozen=True, kw_only=True)
class PocketTask:
    """What a shipped task's prompt is asked, and what it can say."""

    name: str
    kind: Kind
    instruction: str
    answers: Sequence[str] | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SceneTask(PocketTask):
    """A task about scenes. `sample` returns None for a scene that does not lend itself to the task."""

    sample: Callable[[Scene, random.Random], TaskSample | None]


def _caption(scene: Scene, rng: random.Random) -> TaskSample:
    return TaskSample(None, f"{describe(scene)}, the background is {scene.background}")


def _answer(scene: Scene, rng: random.Random) -> TaskSample:
    question, answer, _ = question_about(scene, rng)
    return TaskSample(question, answer)


def _entailment(scene: Scene, rng: random.Random) -> TaskSample:
    """A third each of true, false and undecidable; one false hypothesis in four merely names an absent thing."""
    label = rng.choice(("entailment", "contradiction", "neutral"))
    if label == "neutral":
        return TaskSample(unknowable_about(scene, rng), label)
    if label == "contradiction" and rng.random() < 0.25:
        return TaskSample(groundless_about(scene, rng), label)
    while True:
        statement, truth = statement_about(scene, rng)
        if truth == (label == "entailment"):
            return TaskSample(statement, label)


def _grounding(scene: Scene, rng: random.Random) -> TaskSample:
    return TaskSample(*referring_expression(scene, rng))


COUNTED = {"animal": "animals", "food": "foods", "vehicle": "vehicles"}


def _counting(scene: Scene, rng: random.Random) -> TaskSample:
    """How many of a category; three times in four of one that is there, where there is one that is asked for."""
    shown = [KINDS[o.kind].category for o in scene.objects]
    present = [category for category in COUNTED if category in shown]
    category = rng.choice(present if present and rng.random() < 0.75 else list(COUNTED))
    return TaskSample(COUNTED[category], NUMBERS[shown.count(category)])


def _odd_one_out(scene: Scene, rng: random.Random) -> TaskSample | None:
    """The one thing whose kind, or else whose category, differs from that of all others, which agree."""
    kinds = [o.kind for o in scene.objects]
    for of_things in (kinds, [KINDS[kind].category for kind in kinds]):
        counts = Counter(of_things)
        if len(kinds) >= 3 and len(counts) == 2 and min(counts.values()) == 1:
            return TaskSample(None, kinds[of_things.index(min(counts, key=lambda each: counts[each]))])
    return None


def _category(scene: Scene, rng: random.Random) -> TaskSample | None:
    if len(scene.objects) == 1:
        return TaskSample("in the picture", KINDS[scene.objects[0].kind].category)
    side, (axis, sign) = rng.choice(list(SIDES.items()))
    first, second = sorted(scene.objects, key=lambda o: -sign * o.centre[axis])[:2]
    if abs(first.centre[axis] - second.centre[axis]) < CLEAR_PX:
        return None
    return TaskSample(f"at the {side}", KINDS[first.kind].category)


TASKS: Mapping[str, SceneTask] = {
    task.name: task
    for task in (
        SceneTask(
            name="scene-caption",
            kind="caption",
            instruction=" describe the scene.",
            sample=_caption,
            decoding={"max_length": 32, "no_repeat_ngram": 0},
        ),
        SceneTask(
            name="scene-vqa",
            kind="answer",
            instruction=" scene: {text} describe in a word.",
            sample=_answer,
            answers=("yes", "no", *NUMBERS, *TINTS, *KINDS),
        ),
        SceneTask(
            name="scene-entailment",
            kind="label",
            instruction=' can the image imply " {text} "?',
            sample=_entailment,
            answers=("entailment", "contradiction", "neutral"),
        ),
        SceneTask(
            name="scene-grounding",
            kind="box",
            instruction=" region of {text}?",
            sample=_grounding,
        ),
        SceneTask(
            name="scene-counting",
            kind="answer",
            instruction=" scene: count of {text} in image? describe in a word.",
            sample=_counting,
            answers=NUMBERS,
        ),
        SceneTask(
            name="scene-odd-one-out",
            kind="answer",
            instruction=" which one is unlike the others?",
            sample=_odd_one_out,
            answers=tuple(KINDS),
        ),
        SceneTask(
            name="scene-category",
            kind="answer",
            instruction=" scene: what sort {text}? describe in a word.",
            sample=_category,
            answers=CATEGORIES,
        ),
    )
}
