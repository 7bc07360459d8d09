"""Which held-out samples a run is scored on, and how each is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from promptmux_prompts import Prompt
from promptmux_server.backbone.images import DecodedImage, ImageLimits
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.backbone.weights import LoadedBackbone
from promptmux_server.errors import DataError
from promptmux_server.training.data.pictures import UnreadablePicture, decoded
from promptmux_server.training.data.sample import Place, Sample
from promptmux_server.training.data.survey import Rows
from promptmux_server.training.metrics import Score


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


class Scorer(Protocol):
    """Whoever can answer as the server does."""

    def __call__(self, backbone: OpenBackbone, prompt: Prompt, questions: Sequence[Question]) -> Score:
        """The mean worth of a prompt's answers: the same number whenever it is asked."""
        ...


def questions_of(held_out: Sequence[Rows], most: int) -> list[Question]:
    """At most so many samples, spread evenly over all of them: the same ones every time. Raises DataError."""
    places = [(rows, number) for rows in held_out for number in range(len(rows))]
    chosen = places if len(places) <= most else [places[i * len(places) // most] for i in range(most)]
    questions = []
    for rows, number in chosen:
        sample = rows.sample(number)
        questions.append(Question(sample, rows.source.place(int(rows.lines[number]), sample.entry)))
    return questions
