"""Supervised texts about scenes that `pocket` is pretrained on. Knows no tokens and no shipped task (see `tasks`)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from promptmux_server.pocket.art import CATEGORIES, KINDS
from promptmux_server.pocket.colours import TINTS
from promptmux_server.pocket.questions import HARD_ONES, question_about, standing_of_two
from promptmux_server.pocket.scenes import Box, Scene
from promptmux_server.pocket.statements import coloured, describe, place_in_words, referring_expression, statement_about

Part = str | Box
"""A text with its leading blank, or a box that becomes four location tokens."""


@dataclass(frozen=True)
class Sample:
    """One supervised text of pretraining: source and target parts, and the kind of question it is."""

    kind: str
    source: tuple[Part, ...]
    target: tuple[Part, ...]


_LABELS = ("entailment", "contradiction", "neutral")
ANSWER_WORDS: tuple[str, ...] = (*KINDS, *TINTS, *CATEGORIES, *_LABELS, "circle", "triangle", "rectangle")
"""What a text may be asked to repeat: words that tasks answer with, whether or not a picture ever shows them."""


def pretrain_samples(scene: Scene, rng: random.Random, count: int, *, described: bool) -> list[Sample]:
    """At most `count` different samples, fewer where a scene has little to ask about.

    `described` begins with a caption and a list of all boxes, the densest supervision of a picture; otherwise with a
    caption, an inventory or, now and then, the list: its boxes are most of its tokens, and few of them are news.
    """
    caption, detection = _caption(scene, rng), _detection(scene)
    described_whole = rng.choices((caption, _inventory(scene), detection), weights=(6, 3, 1))
    first = [caption, detection] if described else described_whole
    makers = (_question, _where, _matching, _standing, _region, _echo)
    found = dict.fromkeys(first)
    for maker in rng.choices(makers, weights=(8, 3, 5, 2, 3, 2), k=3 * count):
        if len(found) < count:
            found.setdefault(maker(scene, rng))
    return list(found)


def _caption(scene: Scene, rng: random.Random) -> Sample:
    if rng.random() < 0.5:
        return Sample("caption", (" what does the image describe?",), (f" {describe(scene)} on {scene.background}",))
    return Sample("caption", (" what is in the image?",), (f" {describe(scene)}",))


def _inventory(scene: Scene) -> Sample:
    """Every thing with its colour, where it has one, and its place: what questions ask for one by one."""
    things = ", ".join(f"{coloured(thing)} {place_in_words(thing)}" for thing in scene.left_to_right)
    return Sample("inventory", (" what is each thing like?",), (f" {things}",))


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


def _echo(scene: Scene, rng: random.Random) -> Sample:
    """Words for their own sake. A word that no picture ever brought out stays like all others of its kind, as an input
    and as an answer, and then no prompt can say it."""
    words = " ".join(rng.sample(ANSWER_WORDS, 3))
    return Sample("echo", (f" repeat: {words}",), (f" {words}",))


def _standing(scene: Scene, rng: random.Random) -> Sample:
    """Both sides on which one thing stands from another: more of relations in a text than a yes or a no tells."""
    found = standing_of_two(scene, rng)
    if found is None:
        return _where(scene, rng)
    a, b, sides = found
    return Sample("standing", (f" how does the {a} stand to the {b}?",), (f" {sides}",))


def _question(scene: Scene, rng: random.Random) -> Sample:
    question, answer, sentence = question_about(scene, rng, HARD_ONES)
    if rng.random() < 0.2:
        return Sample("sentence", (f" question: {question} answer in full.",), (f" {sentence}",))
    return Sample("word", (f" question: {question} answer in a word.",), (f" {answer}",))
