"""How far an answer is right: a number from 0 to 1 by the task's kind (ofa-spec 9.5), whoever gave the answer.

Captions are compared by their words, which needs no list of synonyms: good for choosing between steps of a run, not for
a paper's table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from promptmux_prompts import Kind
from promptmux_server.tasks import BoxOutput, LabelOutput, Output
from promptmux_server.tasks.boxes import Box
from promptmux_server.training.data.sample import Sample

ENOUGH_OVERLAP = 0.5

METRICS: Mapping[Kind, str] = {
    "caption": "word_f1",
    "answer": "accuracy",
    "label": "accuracy",
    "box": "acc@0.5",
    "text": "exact",
}


@dataclass(frozen=True)
class Score:
    """The mean of a metric over `n` samples."""

    metric: str
    value: float
    n: int


def worth(kind: Kind, output: Output | None, sample: Sample, labels: Mapping[str, str] | None = None) -> float:
    """What one answer is worth; None stands for an answer that could not be read. `labels` are the manifest's."""
    if output is None:
        return 0.0
    if isinstance(output, BoxOutput):
        assert not isinstance(sample.target, str)
        return float(intersection_over_union(output.box, sample.target) >= ENOUGH_OVERLAP)
    target = str(sample.target)
    if isinstance(output, LabelOutput):
        return float(output.label == (labels or {}).get(target, target))
    right = sample.references or {target: 1.0}
    if kind == "caption":
        return max(word_f1(output.text, text) for text in right)
    return right.get(output.text.strip(), 0.0)


def word_f1(said: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of words, each as often as it comes."""
    one, other = Counter(said.lower().split()), Counter(wanted.lower().split())
    shared = (one & other).total()
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def intersection_over_union(a: Box, b: Box) -> float:
    """Overlap of two boxes, 1e-6 in the denominator (ofa-spec 9.5)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared + 1e-6)
