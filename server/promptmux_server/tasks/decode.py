"""From what a search found to the answer that a user gets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.errors import InvalidParameter, NoBoxFound
from promptmux_server.tasks.boxes import Box, bins_to_box
from promptmux_server.tasks.decoding import Hypothesis, Outcome
from promptmux_server.tasks.outputs import AnswerOutput, BoxOutput, CaptionOutput, LabelOutput, Output, TextOutput
from promptmux_server.tasks.spec import TaskSpec


def decode_outcome(
    spec: TaskSpec, tokenizer: Tokenizer, outcome: Outcome, image_size: tuple[int, int] | None
) -> tuple[Output, float]:
    """The typed answer and its score; `image_size` is (width, height) of the picture that was sent.

    Raises NoBoxFound if a grounding task wrote no box, InvalidParameter if `max_length` left room for no answer or
    a label task was not asked to score its answers.
    """
    if not outcome.hypotheses:
        raise InvalidParameter("decoding.max_length leaves room for no answer.", param="decoding.max_length")
    best = outcome.hypotheses[0]
    if spec.kind == "label":
        return _label(spec, outcome), best.score
    if spec.kind == "box":
        return _box(spec, tokenizer, outcome.hypotheses, image_size)
    text = tokenizer.decode(best.tokens).strip()
    if spec.kind == "caption":
        return CaptionOutput(text), best.score
    return (AnswerOutput(text) if spec.kind == "answer" else TextOutput(text)), best.score


def _label(spec: TaskSpec, outcome: Outcome) -> LabelOutput:
    """Probabilities over labels: softmax of the answers' log-probabilities, answers of one label added up."""
    answers, labels = spec.manifest.answers or (), spec.manifest.labels or {}
    if outcome.candidate_scores is None:
        raise InvalidParameter(
            "A label task scores all its answers: leave decoding.method out.", param="decoding.method"
        )
    highest = max(outcome.candidate_scores)
    weights = [math.exp(score - highest) for score in outcome.candidate_scores]
    probabilities = dict.fromkeys(labels.values(), 0.0)
    for answer, weight in zip(answers, weights, strict=True):
        probabilities[labels[answer]] += weight / sum(weights)
    return LabelOutput(max(probabilities, key=lambda label: probabilities[label]), probabilities)


def _box(
    spec: TaskSpec, tokenizer: Tokenizer, hypotheses: Sequence[Hypothesis], image_size: tuple[int, int] | None
) -> tuple[BoxOutput, float]:
    """The best hypothesis that is four location symbols."""
    if image_size is None:
        raise InvalidParameter("A box needs a picture: send `image` as base64.", param="image")
    for hypothesis in hypotheses:
        bins = [value for token in hypothesis.tokens[:-1] if (value := tokenizer.bin_value(token)) is not None]
        if len(bins) == 4 and len(hypothesis.tokens) == 5:
            x0, y0, x1, y1 = bins
            box: Box = bins_to_box((x0, y0, x1, y1), *image_size, spec.image_size, spec.config)
            return BoxOutput(box), hypothesis.score
    raise NoBoxFound("The model named no region for this text.")
