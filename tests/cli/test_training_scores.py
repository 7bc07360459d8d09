"""Prompts are scored as they are served, and carry canaries that a server accepts."""

from __future__ import annotations

from pathlib import Path

from api.registry_server import serving
from promptmux_prompts import write_prompt
from promptmux_server.cli.training_scores import score_served, with_canaries
from training.job_worker import any_score, backbone, job


def test_a_score_is_the_same_whenever_it_is_asked_and_right_for_right_answers(tmp_path: Path) -> None:
    opened = job(tmp_path)
    prompt = opened._prompt()
    first = score_served(opened.backbone, prompt, opened.exam)
    assert (first.metric, first.n) == ("accuracy", len(opened.exam.questions))
    assert score_served(opened.backbone, prompt, opened.exam) == first


def test_canaries_are_what_a_server_sees_too(tmp_path: Path) -> None:
    opened = job(tmp_path / "job", scorer=any_score)
    prompt = with_canaries(backbone(), opened._prompt(), opened.exam.questions)
    assert prompt.manifest.canary is not None
    assert all(canary.image is not None for canary in prompt.manifest.canary)
    with serving(tmp_path / "served") as served:
        answer = served.put("counting", write_prompt(prompt))
        assert answer.status_code == 201, answer.text
