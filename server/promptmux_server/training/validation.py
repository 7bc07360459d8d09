"""Which held-out samples a run is scored on, and how each is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from promptmux_prompts import Kind, Prompt
from promptmux_server.backbone.images import DecodedImage, ImageLimits
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.backbone.weights import LoadedBackbone
from promptmux_server.errors import DataError
from promptmux_server.training.data.pictures import UnreadablePicture, decoded
from promptmux_server.training.data.sample import Place, Sample
from promptmux_server.training.data.survey import Rows
from promptmux_server.training.metrics import Metric, Score, metric_for, right_texts


@dataclass(frozen=True, eq=False)
class OpenBackbone:
    """A backbone as it was read, and as it computes."""

    loaded: LoadedBackbone
    model: OFA
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Question:
    """A held-out sample, and where it stands."""

    sample: Sample
    place: Place

    def image(self) -> DecodedImage | None:
        """Its picture; raises DataError naming the sample."""
        if self.sample.picture is None:
            return None
        limits = ImageLimits()
        try:
            return decoded(self.sample.picture.read(limits), limits)
        except UnreadablePicture as error:
            raise DataError(
                f"{self.place}: {error}. `promptmux data check --pictures` finds all such lines."
            ) from error


@dataclass(frozen=True)
class Exam:
    """What a run is scored on, and by which metric."""

    metric: Metric
    questions: Sequence[Question]


class Scorer(Protocol):
    """Whoever can answer as the server does."""

    def __call__(self, backbone: OpenBackbone, prompt: Prompt, exam: Exam) -> Score:
        """The score of a prompt on that very model: the same number whenever it is asked."""
        ...


def exam_of(held_out: Sequence[Rows], most: int, kind: Kind, metric: Metric | None = None) -> Exam:
    """At most so many questions, spread evenly over what is held out: the same ones every time. Raises DataError.

    Captions of one picture are one question with as many references, wherever in its file they stand. Without a metric
    it is the kind's (`metrics.metric_for`).
    """
    places = _by_picture(held_out) if kind == "caption" else [[place] for place in _places(held_out)]
    chosen = places if len(places) <= most else [places[i * len(places) // most] for i in range(most)]
    questions = [question for group in chosen for question in _questions(group)][:most]
    return Exam(metric or metric_for(kind, [question.sample for question in questions]), questions)


Standing = tuple[Rows, int]
"""One sample of what is held out."""


def _places(held_out: Sequence[Rows]) -> Iterator[Standing]:
    return ((rows, number) for rows in held_out for number in range(len(rows)))


def _by_picture(held_out: Sequence[Rows]) -> list[list[Standing]]:
    groups: dict[tuple[int, int], list[Standing]] = {}
    for rows, number in _places(held_out):
        groups.setdefault((id(rows), int(rows.groups[number])), []).append((rows, number))
    return list(groups.values())


def _questions(group: Sequence[Standing]) -> list[Question]:
    """The questions that samples of one hash ask: mostly one, whose references are those of all of them."""
    asked: dict[tuple[str, str | None, str | None], Question] = {}
    for rows, number in group:
        sample = rows.sample(number)
        place = rows.source.place(int(rows.lines[number]), sample.entry)
        key = (sample.group, sample.text, sample.premise)
        if key in asked:
            first = asked[key]
            both = replace(first.sample, references={**right_texts(first.sample), **right_texts(sample)})
            asked[key] = replace(first, sample=both)
        else:
            asked[key] = Question(sample, place)
    return list(asked.values())
