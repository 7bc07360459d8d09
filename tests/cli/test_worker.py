"""Trainings that are left to a worker: done, cancelled, given back, taken over, or failed with their reason."""

from __future__ import annotations

import json
import sqlite3
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.tiny_training import CONFIG, prepare
from promptmux_server.cli import app, working
from promptmux_server.cli.working import FULL_S, HELD_S, work
from promptmux_server.errors import CheckpointNotWritten, RunHeld
from promptmux_server.jobs import JobTable
from promptmux_server.jobs.trainings import TrainingRequest, submit
from promptmux_server.training.checkpoint import Checkpoints
from promptmux_server.training.job_config import JobConfig
from promptmux_server.training.job_parts import open_backbone
from promptmux_server.training.run import Run
from promptmux_server.training.validation import OpenBackbone


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


def test_a_job_that_no_worker_can_do_does_not_end_the_worker(
    tmp_path: Path, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = queue(tmp_path)
    (tmp_path / "job.toml").write_text(CONFIG.replace('"out"', '"out2"'))
    possible = queue(tmp_path)

    def opened(config: JobConfig, pocket: Path) -> OpenBackbone:
        if config.output.name == "out":
            raise ZeroDivisionError
        return open_backbone(config, pocket)

    monkeypatch.setattr(working, "open_backbone", opened)
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


def test_a_job_whose_late_worker_still_runs_waits_for_it(
    tmp_path: Path, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = queue(tmp_path)
    with Checkpoints(tmp_path / "out" / "checkpoints").held(), monkeypatch.context() as patched:
        patched.setattr(working, "open_backbone", refuse)  # what takes minutes is not begun in vain
        assert work(table, never, once=True) == 0
    waiting = table.get(job_id)
    assert (waiting.state, waiting.attempts, waiting.started) == ("queued", 0, None)
    assert [event.name for event in table.events(job_id)] == ["queued"]
    assert work(table, never, once=True) == 0  # others would go first now
    later = JobTable(tmp_path / "state" / "jobs.sqlite", clock=lambda: time.time() + HELD_S)
    assert work(later, never, once=True) == 1
    assert table.get(job_id).state == "succeeded"


def test_a_jobs_folder_is_held_from_before_it_is_opened_to_its_end(
    tmp_path: Path, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, places = queue(tmp_path), []

    def told(name: str) -> Callable[..., Any]:
        call = getattr(working, name)

        def held(*arguments: Any) -> Any:
            with pytest.raises(RunHeld), Checkpoints(tmp_path / "out" / "checkpoints").held():
                pass
            places.append(name)
            return call(*arguments)

        return held

    for name in ("open_backbone", "score_served", "keep_learned"):
        monkeypatch.setattr(working, name, told(name))
    work(table, never, once=True)
    assert table.get(job_id).state == "succeeded"
    assert places == ["open_backbone", "score_served", "score_served", "keep_learned"]
    with Checkpoints(tmp_path / "out" / "checkpoints").held():
        pass


def refuse(*_: object) -> None:
    raise AssertionError("nothing is opened here")


class Unwritable:
    """A method of the table that a full disk refuses, the first few times."""

    def __init__(self, name: str, times: int) -> None:
        self._method, self.left = getattr(JobTable, name), times

    def __get__(self, table: JobTable, _: object) -> Callable[..., Any]:
        def method(*arguments: Any) -> Any:
            if self.left:
                self.left -= 1
                raise sqlite3.OperationalError("database or disk is full")
            return self._method(table, *arguments)

        return method


def test_a_table_that_takes_no_change_is_waited_for(
    tmp_path: Path, table: JobTable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = queue(tmp_path)
    for name in ("claim", "begin", "succeed"):
        monkeypatch.setattr(JobTable, name, Unwritable(name, 20))
    assert work(table, never, once=True, idle_s=0.001) == 1
    assert (table.get(job_id).state, table.get(job_id).attempts) == ("succeeded", 1)
    assert len([record for record in caplog.records if "takes no change" in record.message]) == 3


def test_a_result_that_a_stopped_worker_could_not_write_is_found_again(
    tmp_path: Path, table: JobTable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job_id, unwritable = queue(tmp_path), Unwritable("succeed", 1000)
    with monkeypatch.context() as patched:
        patched.setattr(JobTable, "succeed", unwritable)
        assert work(table, lambda: unwritable.left < 990, idle_s=0.001) == 0
    assert "taken up again from its checkpoint" in caplog.text
    curve = (tmp_path / "out" / "curve.jsonl").read_text()
    later = JobTable(tmp_path / "state" / "jobs.sqlite", clock=lambda: time.time() + 1000)  # its lease has run out
    assert work(later, never, once=True) == 1
    assert table.get(job_id).state == "succeeded"
    assert (tmp_path / "out" / "curve.jsonl").read_text() == curve  # no step was taken again


def test_a_job_whose_disk_is_full_is_tried_again_until_its_attempts_end(
    tmp_path: Path, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, clock_s = queue(tmp_path), [time.time()]
    later = JobTable(tmp_path / "state" / "jobs.sqlite", clock=lambda: clock_s[0])

    def full(*_: object) -> None:
        raise CheckpointNotWritten("Make room.")

    monkeypatch.setattr(Checkpoints, "save", full)
    for state in ("queued", "queued", "failed"):
        assert work(later, never, once=True) == 1
        assert table.get(job_id).state == state
        clock_s[0] += FULL_S + 1.0
    assert table.get(job_id).error == {"code": "checkpoint_not_written", "message": "Make room."}
    reasons = [event.data["message"] for event in table.events(job_id) if event.name == "queued" and event.data]
    assert reasons == ["Make room."] * 2


def test_a_job_goes_on_when_its_disk_has_room_again(
    tmp_path: Path, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, save = queue(tmp_path), Checkpoints.save

    def full_behind_step_3(checkpoints: Checkpoints, state: Any, *rest: Any) -> Any:
        if int(state.numbers["step"]) > 3:
            raise CheckpointNotWritten("Make room.")
        return save(checkpoints, state, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", full_behind_step_3)
        work(table, never, once=True)
    later = JobTable(tmp_path / "state" / "jobs.sqlite", clock=lambda: time.time() + FULL_S)
    assert work(later, never, once=True) == 1
    job = table.get(job_id)
    assert (job.state, job.attempts) == ("succeeded", 2)
    assert [event.data["step"] for event in table.events(job_id) if event.name == "score"] == [3, 6]


def test_a_configuration_that_is_wrong_is_not_queued(tmp_path: Path, table: JobTable) -> None:
    (tmp_path / "job.toml").write_text(CONFIG.replace("heldout", "held"))
    arguments = ["train", str(tmp_path / "job.toml"), "--queue", "--state", str(tmp_path / "state")]
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert table.newest(10) == []


def test_a_waiting_job_is_cancelled_at_once(tmp_path: Path, table: JobTable) -> None:
    job_id = queue(tmp_path)
    assert run(tmp_path, "jobs", "cancel", job_id) == f"{job_id}: cancelled"
    assert work(table, never, once=True) == 0
