"""Several processes that share every batch learn what one learns, stop together, and notice who is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.checkpoint import Checkpoints
from promptmux_server.training.data.batches import FileBatches
from promptmux_server.training.job import Job
from promptmux_server.training.job_config import JobConfig
from promptmux_server.training.material import Material
from promptmux_server.training.ranks import ALONE, Alone
from training.job_worker import any_score, backbone, data
from training.rank_worker import LOST_AT, PATIENCE_S, PLAIN, STOP_AT, job_config, run_scenarios
from tuning_cases import Curve, difference

TOLERANCE = 1e-5
WITHIN_S = 120.0


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes have trained each scenario, in a folder of its name."""
    folder = tmp_path_factory.mktemp("together")
    scenarios = ["plain", "noisy", "unreduced", "stopped", "dying", "silent"]
    for scenario in scenarios:
        (folder / scenario).mkdir()
        data(folder / scenario)
    run_scenarios(folder, scenarios, WITHIN_S)
    return folder


def told(folder: Path, scenario: str, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{scenario}-{number}.json").read_text())
    return found


def curve(output: Path) -> Curve:
    lines = [json.loads(line) for line in (output / "out" / "curve.jsonl").read_text().splitlines()]
    return [(line["loss"], line["gradient_norm"]) for line in lines if "loss" in line]


def alone(folder: Path, scenario: str) -> Curve:
    data(folder)
    with Job(job_config(folder, scenario), backbone(), any_score) as job:
        job.resume()
        list(job.events())
    return curve(folder)


@pytest.mark.parametrize("scenario", ["plain", "noisy"])
def test_two_processes_have_the_curve_of_one(together: Path, tmp_path: Path, scenario: str) -> None:
    expected = alone(tmp_path, scenario)
    assert len(expected) == PLAIN.steps
    assert difference(curve(together / scenario), expected) <= TOLERANCE


@pytest.mark.parametrize("scenario", ["plain", "noisy"])
def test_both_hold_the_same_bits_at_the_end(together: Path, scenario: str) -> None:
    assert told(together, scenario, 0) == told(together, scenario, 1)
    assert told(together, scenario, 0)["step"] == PLAIN.steps


def test_without_adding_gradients_up_the_curve_is_another(together: Path, tmp_path: Path) -> None:
    assert difference(curve(together / "unreduced"), alone(tmp_path, "plain")) > 100 * TOLERANCE
    assert told(together, "unreduced", 0) != told(together, "unreduced", 1)


def test_rows_that_draw_by_process_have_another_curve(
    together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the noisy curve: what a row draws must not depend on its place among the rows of a process."""
    monkeypatch.setattr(Alone, "number", 1)
    monkeypatch.setattr("promptmux_server.training.material.FileBatches", whole_batches)
    assert difference(curve(together / "noisy"), alone(tmp_path, "noisy")) > 100 * TOLERANCE


def whole_batches(*arguments: Any, worker: int, workers: int) -> FileBatches:
    return FileBatches(*arguments)


def test_one_that_is_told_to_stop_stops_both_behind_the_same_step(together: Path) -> None:
    assert told(together, "stopped", 0)["step"] == told(together, "stopped", 1)["step"] == STOP_AT
    newest = Checkpoints(together / "stopped" / "out" / "checkpoints").newest()
    assert newest is not None
    assert newest.mark.step == STOP_AT


def test_a_job_that_two_left_is_ended_by_one(together: Path, tmp_path: Path) -> None:
    with Job(job_config(together / "stopped", "stopped"), backbone(), any_score) as job:
        assert job.resume() == STOP_AT
        list(job.events())
    assert difference(curve(together / "stopped"), alone(tmp_path, "plain")) <= TOLERANCE


@pytest.mark.parametrize(("scenario", "within_s"), [("dying", PATIENCE_S), ("silent", 3 * PATIENCE_S)])
def test_who_is_lost_ends_the_other_in_time(together: Path, scenario: str, within_s: float) -> None:
    found = told(together, scenario, 0)
    assert "Another process of this run has ended or does not answer" in found["lost"]
    assert found["after_s"] < within_s
    newest = Checkpoints(together / scenario / "out" / "checkpoints").newest()
    assert newest is not None
    assert newest.mark.step == LOST_AT - 1


class Several(Alone):
    """Three processes, of which nobody asks the other two."""

    count = 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": 2}, "run.rows: 3 processes need a row each"),
        ({"drop_worst": 0.2}, "steps.drop_worst: the worst tokens of a batch are found where all of it is"),
        ({"device": "cuda:0"}, "machine.device: several processes need a device each"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    shared = changed(job_config(tmp_path, "plain"), **changes)
    with pytest.raises(TrainingConfigError, match=said):
        Material(shared, backbone(), Several())
    if "device" not in changes:
        Material(shared, backbone(), ALONE)


def changed(config: JobConfig, rows: int = 5, drop_worst: float = 0.0, device: str = "cpu") -> JobConfig:
    changes = {
        "run": replace(config.run, rows=rows),
        "steps": replace(config.steps, drop_worst=drop_worst),
        "machine": replace(config.machine, device=device),
    }
    return config.model_copy(update=changes)
