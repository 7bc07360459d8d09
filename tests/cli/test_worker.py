"""Trainings that are left to a worker: done, cancelled, given back, taken over, or failed with their reason."""

from __future__ import annotations

import json
import sqlite3
import time
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.tiny_training import CONFIG, prepare
from promptmux_server.cli import app
from promptmux_server.cli.working import HELD_S, work
from promptmux_server.jobs import JobTable
from promptmux_server.jobs.trainings import TrainingRequest, submit
from promptmux_server.training.checkpoint import Checkpoints
from promptmux_server.training.run import Run


@pytest.fixture
def table(tmp_path: Path) -> JobTable:
    prepare(tmp_path)
    return JobTable(tmp_path / "state" / "jobs.sqlite")


def run(folder: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--state", str(folder / "state")], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def queue(folder: Path) -> str:
    return run(folder, "train", str(folder / "job.toml"), "--queue")


def never() -> bool:
    return False


def test_a_queued_training_is_done_by_a_worker_and_tells_of_it(tmp_path: Path, table: JobTable) -> None:
    job_id = queue(tmp_path)
    assert job_id in run(tmp_path, "jobs", "list")
    assert run(tmp_path, "worker", "--once") == "jobs taken: 1"
    job = table.get(job_id)
    assert job.state == "succeeded", job.error
    assert job.result is not None
    assert Path(job.result["file"]).is_file()
    names = [event.name for event in table.events(job_id)]
    assert names[:2] == ["queued", "started"]
    assert names.count("score") == 2
    assert names[-1] == "succeeded"
    assert "attempt 1 of 3" in run(tmp_path, "jobs", "show", job_id)


def test_a_worker_that_is_asked_to_stop_gives_its_job_back(tmp_path: Path, table: JobTable) -> None:
    job_id, asked = queue(tmp_path), iter([False, False, True, True])
    assert work(table, lambda: next(asked)) == 1
    assert table.get(job_id).state == "queued"
    assert work(table, never, once=True) == 1
    assert table.get(job_id).state == "succeeded"


def test_a_running_job_is_cancelled_behind_a_step(
    tmp_path: Path, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, absorb = queue(tmp_path), Run.absorb

    def slow(run: Run, loss: object) -> object:
        table.cancel(job_id)
        time.sleep(0.3)
        return absorb(run, loss)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "absorb", slow)
    work(table, never, once=True, lease_s=0.4)
    assert table.get(job_id).state == "cancelled"


def test_a_job_that_cannot_be_done_says_why(tmp_path: Path, table: JobTable) -> None:
    job_id = queue(tmp_path)
    (tmp_path / "data.jsonl").write_text("{broken\n")
    work(table, never, once=True)
    job = table.get(job_id)
    assert job.state == "failed"
    assert job.error is not None
    assert job.error["code"] == "invalid_training_data"
    assert "data.jsonl, line 1" in job.error["message"]


def test_events_that_cannot_be_written_end_no_training(
    tmp_path: Path, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = queue(tmp_path)

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(JobTable, "tell", full)
    assert work(table, never, once=True) == 1
    assert table.get(job_id).state == "succeeded"


def test_a_job_that_no_worker_can_do_does_not_end_the_worker(tmp_path: Path, table: JobTable) -> None:
    (tmp_path / "job.toml").write_text(CONFIG.replace("steps = 6", "steps = 6, seed = 1" + "0" * 30))
    impossible = queue(tmp_path)
    (tmp_path / "job.toml").write_text(CONFIG.replace('"out"', '"out2"'))
    possible = queue(tmp_path)
    assert work(table, never, once=True) == 2
    failed = table.get(impossible)
    assert (failed.state, (failed.error or {}).get("code")) == ("failed", "internal")
    assert table.get(possible).state == "succeeded"


def test_two_queued_jobs_do_not_share_an_output_folder(tmp_path: Path, table: JobTable) -> None:
    first = queue(tmp_path)
    arguments = ["train", str(tmp_path / "job.toml"), "--queue", "--state", str(tmp_path / "state")]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert first in refused.stderr
    run(tmp_path, "jobs", "cancel", first)
    queue(tmp_path)


def test_push_asks_the_worker_to_publish(tmp_path: Path, table: JobTable) -> None:
    run(tmp_path, "train", str(tmp_path / "job.toml"), "--queue", "--push")
    assert table.newest(1)[0].payload["publish"] is True


def test_a_configuration_may_be_json(tmp_path: Path, table: JobTable) -> None:
    (tmp_path / "job.json").write_text(json.dumps(tomllib.loads(CONFIG)))
    job_id = run(tmp_path, "train", str(tmp_path / "job.json"), "--queue")
    work(table, never, once=True)
    assert table.get(job_id).state == "succeeded"
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "job.json").read_bytes()


def test_links_that_change_after_the_queue_lead_nowhere(tmp_path: Path, table: JobTable) -> None:
    """A job whose paths must stay in their folder is asked for them again when it is begun."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("tiny", "data.jsonl", *(f"{i}.png" for i in range(12))):
        (tmp_path / name).rename(root / name)
    asked = TrainingRequest(config=CONFIG, name="config.toml", folder=str(root), task="counting", confined=True)
    job_id = submit(table, asked, asked.parsed().output).id
    (tmp_path / "elsewhere").mkdir()
    (root / "out").symlink_to(tmp_path / "elsewhere")
    work(table, never, once=True)
    error = table.get(job_id).error
    assert error is not None
    assert "output: this path leads out" in error["message"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_job_whose_late_worker_still_runs_waits_for_it(tmp_path: Path, table: JobTable) -> None:
    job_id = queue(tmp_path)
    with Checkpoints(tmp_path / "out" / "checkpoints").held():
        assert work(table, never, once=True) == 0
        assert table.get(job_id).state == "queued"
    assert work(table, never, once=True) == 0  # others would go first now
    later = JobTable(tmp_path / "state" / "jobs.sqlite", clock=lambda: time.time() + HELD_S)
    assert work(later, never, once=True) == 1
    assert table.get(job_id).state == "succeeded"


def test_a_configuration_that_is_wrong_is_not_queued(tmp_path: Path, table: JobTable) -> None:
    (tmp_path / "job.toml").write_text(CONFIG.replace("heldout", "held"))
    arguments = ["train", str(tmp_path / "job.toml"), "--queue", "--state", str(tmp_path / "state")]
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert table.newest(10) == []


def test_a_waiting_job_is_cancelled_at_once(tmp_path: Path, table: JobTable) -> None:
    job_id = queue(tmp_path)
    assert run(tmp_path, "jobs", "cancel", job_id) == f"{job_id}: cancelled"
    assert work(table, never, once=True) == 0
