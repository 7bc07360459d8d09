"""Supervised texts about scenes that `pocket` is pretrained on. Knows no tokens and no shipped task (see `tasks`)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.questions import HARD_ONES, question_about
from promptmux_server.pocket.scenes import Box, Scene
from promptmux_server.pocket.statements import describe, referring_expression, statement_about

Part = str | Box
"""A text with its leading blank, or a box that becomes four location tokens."""


@dataclass(frozen=True)
class Sample:
    """One supervised text of pretraining: source and target parts, and the kind of question it is."""

    kind: str
    source: tuple[Part, ...]
    target: tuple[Part, ...]


def pretrain_samples(scene: Scene, rng: random.Random, count: int, *, described: bool) -> list[Sample]:
    """`count` samples. `described` begins with a caption and a list of all boxes, the densest supervision of a picture;
    otherwise with a caption or, now and then, the list: its boxes are most of its tokens, and few of them are news."""
    caption, detection = _caption(scene, rng), _detection(scene)
    first = [caption, detection] if described else [caption if rng.random() < 0.8 else detection]
    makers: tuple[Callable[[Scene, random.Random], Sample], ...] = (_question, _where, _matching, _region)
    rest = rng.choices(makers, weights=(8, 4, 6, 1), k=count - len(first))
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
    question, answer, sentence = question_about(scene, rng, HARD_ONES)
    if rng.random() < 0.2:
        return Sample("sentence", (f" question: {question} answer in full.",), (f" {sentence}",))
    return Sample("word", (f" question: {question} answer in a word.",), (f" {answer}",))
