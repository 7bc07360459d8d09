"""How far answers are right, by the metric of a task's kind (ofa-spec 9.5), whoever gave them.

Most metrics are means of what each answer is worth, a number from 0 to 1; CIDEr asks how captions differ between
pictures, so it knows only all of them together. Nothing here is read from a file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from promptmux_prompts import Kind
from promptmux_server.tasks import BoxOutput, CaptionOutput, LabelOutput, Output
from promptmux_server.tasks.boxes import Box
from promptmux_server.training.cider import cider_d
from promptmux_server.training.data.ofa_tsv import caption_words
from promptmux_server.training.data.sample import Sample

ENOUGH_OVERLAP = 0.5

Metric = Literal["cider", "word_f1", "accuracy", "acc@0.5", "exact"]
CaptionMetric = Literal["cider", "word_f1"]

METRICS: Mapping[Kind, Metric] = {
    "caption": "cider",
    "answer": "accuracy",
    "label": "accuracy",
    "box": "acc@0.5",
    "text": "exact",
}


@dataclass(frozen=True)
class Score:
    """A metric over `n` samples."""

    metric: str
    value: float
    n: int


def metric_for(kind: Kind, samples: Sequence[Sample]) -> Metric:
    """The kind's metric; for captions that one cannot tell apart, since all have the same references, word F1."""
    if kind == "caption" and len({frozenset(right_texts(sample)) for sample in samples}) == 1:
        return "word_f1"
    return METRICS[kind]


def score_of(
    metric: Metric, outputs: Sequence[Output | None], samples: Sequence[Sample], labels: Mapping[str, str] | None = None
) -> Score:
    """The score of answers to samples; None: one that could not be read. `labels` are the manifest's."""
    if metric == "cider":
        said = [caption_words(output.text) if isinstance(output, CaptionOutput) else [] for output in outputs]
        values = cider_d(said, [[caption_words(text) for text in right_texts(sample)] for sample in samples])
    else:
        values = [worth(metric, output, sample, labels) for output, sample in zip(outputs, samples, strict=True)]
    return Score(metric, math.fsum(values) / len(values), len(values))


def worth(metric: Metric, output: Output | None, sample: Sample, labels: Mapping[str, str] | None = None) -> float:
    """What one answer is worth by any metric but CIDEr."""
    if output is None:
        return 0.0
    if isinstance(output, BoxOutput):
        assert not isinstance(sample.target, str)
        return float(intersection_over_union(output.box, sample.target) >= ENOUGH_OVERLAP)
    target = str(sample.target)
    if isinstance(output, LabelOutput):
        return float(output.label == (labels or {}).get(target, target))
    right = right_texts(sample)
    if metric == "word_f1":
        return max(word_f1(output.text, text) for text in right)
    return right.get(output.text.strip(), 0.0)


def right_texts(sample: Sample) -> Mapping[str, float]:
    """All texts that count as right, with what each is worth."""
    return sample.references or {str(sample.target): 1.0}


def word_f1(said: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of words, each as often as it comes."""
    one, other = Counter(caption_words(said)), Counter(caption_words(wanted))
    shared = (one & other).total()
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def intersection_over_union(a: Box, b: Box) -> float:
    """Overlap of two boxes, 1e-6 in the denominator (ofa-spec 9.5)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared + 1e-6)
