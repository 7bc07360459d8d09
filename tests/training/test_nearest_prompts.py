"""The nearest prompts are those from which a task's first steps learn best, however many are asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from promptmux_prompts import Prompt
from promptmux_server.errors import DataError
from promptmux_server.training import nearest as nearest_module
from promptmux_server.training.batch import Batches, Cursor, TrainingBatch
from promptmux_server.training.cohort import train
from promptmux_server.training.initial import begin_of_prompts
from promptmux_server.training.methods import DeepPrompts
from promptmux_server.training.nearest import PROBES, Near, nearest
from promptmux_server.training.recipe import PLAINLY, PromptRecipe, StepRecipe
from promptmux_server.training.run import Run
from tuning_cases import OneBatch, RandomBatches, curves

RECIPE = PromptRecipe(encoder_length=4, decoder_length=3, dropout=0.0)
BATCH = OneBatch(RandomBatches(1, rows=4).take(0)[0])


def probe(prompt: Prompt, data: Batches = BATCH) -> Run:
    begin = begin_of_prompts([prompt], RECIPE.encoder_length, RECIPE.decoder_length)
    method = DeepPrompts(tiny.model(), RECIPE, seed=1, begin=begin)
    return Run(prompt.digest, method, StepRecipe(steps=PROBES, warmup=0.0, learning_rate=0.01), data)


def learned() -> Prompt:
    """A prompt that has learned the very batch that is asked."""
    method = DeepPrompts(tiny.model(), RECIPE, seed=9)
    run = Run("teacher", method, StepRecipe(steps=40, learning_rate=0.1), BATCH)
    curves([run])
    return Prompt.build(tiny.prompt("learned").manifest, *run.saved().values())


STRANGERS = [tiny.prompt(f"stranger-{seed}", seed=seed) for seed in range(4)]


def test_who_has_learned_the_task_is_nearest() -> None:
    teacher = learned()
    found = nearest([*STRANGERS, teacher], 2, probe, PLAINLY)
    assert found[0].prompt.digest == teacher.digest
    assert found[0].distance < 0.8 * found[1].distance


def test_the_distance_is_the_mean_loss_of_the_first_steps() -> None:
    reports = [report.nll for report in train(probe(STRANGERS[0]))]
    (near,) = nearest([STRANGERS[0]], 1, probe, PLAINLY)
    assert len(reports) == PROBES
    assert near.distance == pytest.approx(sum(reports) / PROBES, rel=1e-5)


def test_company_and_groups_change_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(found: list[Near]) -> list[str]:
        return [near.prompt.manifest.name for near in found]

    together = names(nearest(STRANGERS, 3, probe, PLAINLY))
    monkeypatch.setattr(nearest_module, "TOGETHER", 1)
    assert names(nearest(STRANGERS, 3, probe, PLAINLY)) == together
    assert len(together) == 3


def test_one_content_under_two_names_counts_once() -> None:
    assert len(nearest([STRANGERS[0], STRANGERS[0], STRANGERS[1]], 3, probe, PLAINLY)) == 2


def test_a_prompt_that_diverges_is_left_out_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    spoilt = tiny.prompt("spoilt", seed=7)
    spoilt = replace(spoilt, encoder_key=torch.full_like(spoilt.encoder_key, float("inf")))
    found = nearest([spoilt, STRANGERS[0]], 2, probe, PLAINLY)
    assert [near.prompt for near in found] == [STRANGERS[0]]
    assert "left out as a beginning" in caplog.text


class Broken:
    def take(self, cursor: Cursor) -> tuple[TrainingBatch, Cursor]:
        raise DataError("Line 7 is no picture.")


def test_data_that_cannot_be_read_are_an_error_of_their_own() -> None:
    with pytest.raises(DataError, match="Line 7"):
        nearest(STRANGERS, 1, lambda prompt: probe(prompt, Broken()), PLAINLY)
