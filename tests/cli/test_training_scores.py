"""Prompts are scored as they are served, and carry canaries that a server accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.registry_server import serving
from promptmux_prompts import write_prompt
from promptmux_server.cli.training_scores import score_served, with_canaries
from promptmux_server.tasks import AnswerOutput, BoxOutput, CaptionOutput, LabelOutput, Output
from promptmux_server.training.data.sample import Sample
from promptmux_server.training.metrics import worth
from training.job_worker import any_score, backbone, job


def test_a_score_is_the_same_whenever_it_is_asked_and_right_for_right_answers(tmp_path: Path) -> None:
    opened = job(tmp_path)
    prompt = opened._prompt()
    first = score_served(opened.backbone, prompt, opened.questions)
    assert (first.metric, first.n) == ("accuracy", len(opened.questions))
    assert score_served(opened.backbone, prompt, opened.questions) == first


def test_canaries_are_what_a_server_sees_too(tmp_path: Path) -> None:
    opened = job(tmp_path / "job", scorer=any_score)
    prompt = with_canaries(backbone(), opened._prompt(), opened.questions)
    assert prompt.manifest.canary is not None
    assert all(canary.image is not None for canary in prompt.manifest.canary)
    with serving(tmp_path / "served") as served:
        answer = served.put("counting", write_prompt(prompt))
        assert answer.status_code == 201, answer.text


BOX = Sample(target=(0.0, 0.0, 10.0, 10.0), group="a")
WORDS = Sample(target="a red dog", group="a", references={"a red dog": 1.0, "one dog": 1.0})
LABEL = Sample(target="yes", group="a")
VQA = Sample(target="dog", group="a", references={"dog": 1.0, "puppy": 0.3})


@pytest.mark.parametrize(
    ("kind", "output", "sample", "expected"),
    [
        ("box", BoxOutput((0.0, 0.0, 10.0, 5.1)), BOX, 1.0),
        ("box", BoxOutput((0.0, 0.0, 10.0, 4.9)), BOX, 0.0),
        ("box", None, BOX, 0.0),
        ("caption", CaptionOutput("a red dog"), WORDS, 1.0),
        ("caption", CaptionOutput("One dog"), WORDS, 1.0),
        ("caption", CaptionOutput("a dog"), WORDS, 0.8),
        ("caption", CaptionOutput("cat"), WORDS, 0.0),
        ("label", LabelOutput("entailment", {}), LABEL, 1.0),
        ("label", LabelOutput("yes", {}), LABEL, 0.0),
        ("answer", AnswerOutput("dog"), VQA, 1.0),
        ("answer", AnswerOutput("puppy"), VQA, 0.3),
        ("answer", AnswerOutput("cat"), VQA, 0.0),
    ],
)
def test_an_answer_is_worth_what_the_truth_says(
    kind: str, output: Output | None, sample: Sample, expected: float
) -> None:
    found = worth(kind, output, sample, {"yes": "entailment"})  # type: ignore[arg-type]
    assert found == pytest.approx(expected)
