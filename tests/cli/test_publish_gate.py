"""A trained prompt replaces the one that is served only if it is better by the margin, and never another version."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import typer

import tiny
from api.registry_server import Served, serving
from promptmux_prompts import Prompt, write_prompt
from promptmux_server.cli.prompt_refusals import connected
from promptmux_server.cli.publish_gate import Verdict, publish_if_better
from training.job_worker import backbone


def trained(score: float, seed: int = 1) -> Prompt:
    return tiny.prompt("vqa", seed=seed, metric={"name": "accuracy", "value": score, "n": 10})


def gate(served: Served, prompt: Prompt, before: float, margin: float = 0.0) -> Verdict:
    """What the gate decides where the served prompt scores `before`."""
    shape, data = backbone().loaded.prompt_shape, write_prompt(prompt)
    with connected(f"http://127.0.0.1:{served.port}", "vqa") as client:
        return publish_if_better(client, "vqa", prompt, data, lambda _: before, margin=margin, shape=shape)


def current(served: Served) -> int:
    return int(served.client.get("/v1/prompts/vqa").json()["version"])


def test_the_first_of_a_name_is_published(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        verdict = gate(served, trained(0.1), before=0.9)
        assert (verdict.published, verdict.version, verdict.served_score) == (True, 1, None)
        assert current(served) == 1


@pytest.mark.parametrize(
    ("score", "before", "margin", "published"),
    [
        (0.8, 0.7, 0.0, True),
        (0.8, 0.7, 0.05, True),
        (0.8, 0.7, 0.2, False),
        (0.7, 0.7, 0.0, False),
        (0.6, 0.7, 0.0, False),
    ],
)
def test_only_what_is_better_by_the_margin_is_published(
    tmp_path: Path, score: float, before: float, margin: float, published: bool
) -> None:
    with serving(tmp_path, tiny.prompt("vqa")) as served:
        verdict = gate(served, trained(score), before, margin)
        assert verdict.published is published
        assert current(served) == (2 if published else 1)
        assert f"it scores {score:.4f}, and version 1 scores {before:.4f}" in verdict.reason


def test_a_version_that_came_meanwhile_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path, tiny.prompt("vqa")) as served:

        def overtaken(_: Prompt) -> float:
            assert served.put("vqa", tiny.prompt("vqa", seed=9)).status_code == 201
            return 0.1

        prompt, shape = trained(0.9), backbone().loaded.prompt_shape
        with pytest.raises(typer.Exit), connected(f"http://127.0.0.1:{served.port}", "vqa") as client:
            publish_if_better(client, "vqa", prompt, write_prompt(prompt), overtaken, margin=0.0, shape=shape)
        assert "vqa is at version 2" in capsys.readouterr().err
        assert current(served) == 2


def test_what_is_served_already_is_not_published_again(tmp_path: Path) -> None:
    """As after a crash between publishing and telling of it."""
    with serving(tmp_path) as served:
        assert gate(served, trained(0.8), before=0.0).version == 1
        again = gate(served, trained(0.8), before=0.8)
        assert (again.published, again.version, current(served)) == (True, 1, 1)
        assert not gate(served, trained(0.8, seed=2), before=0.8).published


def test_what_cannot_be_compared_is_kept(tmp_path: Path) -> None:
    with serving(tmp_path, tiny.prompt("vqa")) as served:
        mine = trained(0.9)
        foreign = Prompt.build(replace(mine.manifest, fingerprint="0" * 64), *_sides(mine))
        verdict = gate(served, foreign, before=0.0)
        assert not verdict.published
        assert "cannot be compared" in verdict.reason
        assert current(served) == 1


def test_a_server_of_another_backbone_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path) as served:
        mine = trained(0.9)
        foreign = Prompt.build(replace(mine.manifest, fingerprint="0" * 64), *_sides(mine))
        with pytest.raises(typer.Exit):
            gate(served, foreign, before=0.0)
        assert "was trained for backbone 'tiny' with another fingerprint" in capsys.readouterr().err
        assert served.client.get("/v1/prompts/vqa").status_code == 404
        assert gate(served, mine, before=0.0).published


def _sides(prompt: Prompt) -> tuple[object, ...]:
    return prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value
