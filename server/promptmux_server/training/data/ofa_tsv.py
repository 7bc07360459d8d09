"""OFA's tab-separated files: one sample a line, the picture in base64 within it (ofa-spec 7).

Columns are those of the released files, by kind of task. Captions are cleaned as OFA cleans its targets.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

from promptmux_prompts import Kind
from promptmux_server.tasks.boxes import Box
from promptmux_server.training.data.fields import best_of, box_of, confidence_of, text_of
from promptmux_server.training.data.pictures import InlinePicture
from promptmux_server.training.data.sample import Defect, Sample

MAX_CAPTION_WORDS = 20


@dataclass(frozen=True)
class Columns:
    """Where a released file has what; numbers from 0. Column 1 is the picture's id in all of them."""

    count: int
    image: int
    target: int
    text: int | None = None
    premise: int | None = None


COLUMNS: Mapping[Kind, Columns] = {
    "box": Columns(5, image=4, text=2, target=3),  # RefCOCO: id, image id, text, box, image
    "label": Columns(6, image=2, text=3, premise=4, target=5),  # SNLI-VE: ..., image, hypothesis, premise, label
    "answer": Columns(6, image=5, text=2, target=3),  # VQA: id, image id, question, answers, objects, image
    "caption": Columns(5, image=4, target=2),  # id, image id, caption, objects, image
}


class OfaTsv:
    """Lines for one kind of task; `premise` says whether the task takes the premise that SNLI-VE has."""

    inline = True

    def __init__(self, kind: Kind, *, premise: bool) -> None:
        self._kind, self._columns, self._premise = kind, COLUMNS[kind], premise
        self.identity = f"tsv {kind} {premise}"
        """All that decides how a line is read."""

    def parse(self, line: bytes) -> Sample:
        """Raises Defect."""
        columns = self._columns
        try:
            values = line.decode().split("\t")
        except UnicodeDecodeError as error:
            raise Defect("not UTF-8 text") from error
        if len(values) != columns.count:
            raise Defect(
                f"has {len(values)} columns, and {columns.count} are needed: one tab between two columns, none within"
            )
        target, confidence, references = self._target(values[columns.target])
        premise = columns.premise if self._premise else None
        return Sample(
            target=target,
            picture=InlinePicture(text_of("the picture's column", values[columns.image])),
            text=None if columns.text is None else text_of("the text's column", values[columns.text]),
            premise=None if premise is None else text_of("the premise's column", values[premise]),
            confidence=confidence,
            references=references,
            group=values[1],
        )

    def _target(self, value: str) -> tuple[str | Box, float, dict[str, float]]:
        """What is learned, its confidence, and all texts that count as right."""
        if self._kind == "box":
            return box_in_text(value), 1.0, {}
        if self._kind == "label":
            return text_of("the label's column", value), 1.0, {}
        if self._kind == "answer":
            references = weighted_answers(value)
        else:
            references = {text_of("each caption", without_punctuation(caption)): 1.0 for caption in value.split("&&")}
            return caption_target(next(iter(references))), 1.0, references
        return *best_of(references), references


def weighted_answers(value: str) -> dict[str, float]:
    """VQA's `confidence|!+answer&&confidence|!+answer...`; raises Defect."""
    answers = {}
    for part in value.split("&&"):
        confidence, found, answer = part.partition("|!+")
        try:
            worth = float(confidence) if found else None
        except ValueError:
            worth = None
        answers[text_of("each answer", answer)] = confidence_of("each answer's confidence, as in `1.0|!+yes`,", worth)
    return answers


def box_in_text(value: str) -> Box:
    """RefCOCO's `x0,y0,x1,y1`; raises Defect."""
    try:
        numbers = [float(number) for number in value.split(",")]
    except ValueError:
        numbers = []
    return box_of("the box's column", numbers)


def caption_target(caption: str) -> str:
    """A caption as OFA learns it: without punctuation, at most 20 words."""
    return " ".join(without_punctuation(caption).split()[:MAX_CAPTION_WORDS])


def without_punctuation(caption: str) -> str:
    """A caption as a reference to be scored against: whole, its words separated by one blank."""
    return " ".join(caption.translate(_NO_PUNCTUATION).split())


def caption_words(caption: str) -> list[str]:
    """What is compared of captions: their words in lower case."""
    return without_punctuation(caption).lower().split()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
