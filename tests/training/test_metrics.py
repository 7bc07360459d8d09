"""An answer is worth what the truth says: boxes by their overlap, labels and texts by equality, captions by CIDEr."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from promptmux_server.tasks import AnswerOutput, BoxOutput, CaptionOutput, LabelOutput, Output, TextOutput
from promptmux_server.training.data.coco import consensus
from promptmux_server.training.data.sample import Sample
from promptmux_server.training.metrics import Metric, metric_for, score_of, worth

BOX = Sample(target=(0.0, 0.0, 10.0, 10.0), group="a")
WORDS = Sample(target="a red dog", group="a", references={"a red dog": 1.0, "one dog": 1.0})
LABEL = Sample(target="yes", group="a")
VQA = Sample(target="dog", group="a", references={"dog": 1.0, "puppy": 0.3})
TEXT = Sample(target="dog", group="a")


@pytest.mark.parametrize(
    ("metric", "output", "sample", "expected"),
    [
        ("acc@0.5", BoxOutput((0.0, 0.0, 10.0, 5.1)), BOX, 1.0),
        ("acc@0.5", BoxOutput((0.0, 0.0, 10.0, 4.9)), BOX, 0.0),
        ("acc@0.5", BoxOutput((10.0, 0.0, 20.0, 10.0)), BOX, 0.0),  # they touch
        ("acc@0.5", BoxOutput((10.0, 10.0, 0.0, 0.0)), BOX, 0.0),  # corners the wrong way round
        ("acc@0.5", None, BOX, 0.0),
        ("word_f1", CaptionOutput("a red dog"), WORDS, 1.0),
        ("word_f1", CaptionOutput("One dog."), WORDS, 1.0),
        ("word_f1", CaptionOutput("a dog"), WORDS, 0.8),
        ("word_f1", CaptionOutput("cat"), WORDS, 0.0),
        ("accuracy", LabelOutput("entailment", {}), LABEL, 1.0),
        ("accuracy", LabelOutput("yes", {}), LABEL, 0.0),
        ("accuracy", AnswerOutput("dog"), VQA, 1.0),
        ("accuracy", AnswerOutput("puppy"), VQA, 0.3),
        ("accuracy", AnswerOutput("cat"), VQA, 0.0),
        ("exact", TextOutput("dog"), TEXT, 1.0),
        ("exact", TextOutput("a dog"), TEXT, 0.0),
    ],
)
def test_an_answer_is_worth_what_the_truth_says(
    metric: Metric, output: Output | None, sample: Sample, expected: float
) -> None:
    assert worth(metric, output, sample, {"yes": "entailment"}) == pytest.approx(expected)


@pytest.mark.parametrize("agreeing", range(11))
def test_vqas_accuracy_is_the_mean_over_all_nine_of_ten_people(agreeing: int) -> None:
    people = ["dog"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    nines = list(itertools.combinations(people, 9))
    expected = sum(min(nine.count("dog") / 3, 1.0) for nine in nines) / len(nines)
    sample = Sample(target=people[0], group="a", references=consensus([{"answer": text} for text in people]))
    assert score_of("accuracy", [AnswerOutput("dog")], [sample]).value == pytest.approx(expected)


def captions(*references: Sequence[str]) -> list[Sample]:
    return [Sample(target=texts[0], group="a", references=dict.fromkeys(texts, 1.0)) for texts in references]


def test_captions_are_scored_together_without_case_and_punctuation() -> None:
    samples = captions(["A red dog.", "one dog"], ["two cats on a mat"])
    clean = score_of("cider", [CaptionOutput("a red dog"), CaptionOutput("two cats on a mat")], samples)
    assert (clean.metric, clean.n) == ("cider", 2)
    assert score_of("cider", [CaptionOutput("A RED DOG!"), CaptionOutput("Two cats, on a mat")], samples) == clean
    swapped = score_of("cider", [CaptionOutput("two cats on a mat"), CaptionOutput("a red dog")], samples)
    assert swapped.value < clean.value
    unread = score_of("cider", [None, CaptionOutput("two cats on a mat")], samples)
    assert 0.0 < unread.value < clean.value


def test_captions_that_all_pictures_share_are_scored_by_their_words() -> None:
    same = captions(["a dog", "one dog"], ["one dog", "a dog"])
    assert metric_for("caption", same) == metric_for("caption", same[:1]) == "word_f1"
    assert metric_for("caption", [*same, *captions(["a cat"])]) == "cider"
    assert metric_for("answer", [VQA]) == "accuracy"
    assert score_of("cider", [CaptionOutput("a dog")] * 2, same).value == 0.0  # why
