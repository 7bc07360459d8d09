"""A worker that publishes: what is better and nothing else, once, and never at the price of the trained file."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from api.registry_server import SETTINGS, Served, serving
from cli import tiny_training
from cli.tiny_training import prepare
from promptmux_prompts import load_manifest
from promptmux_server.api.keys import Keys
from promptmux_server.cli import working
from promptmux_server.cli.working import work
from promptmux_server.errors import LeaseLost
from promptmux_server.jobs import Claim, JobTable
from promptmux_server.jobs.trainings import TrainingRequest, submit

CONFIG = tiny_training.CONFIG.replace("steps = 6", "steps = 2").replace("every = 3", "every = 2") + "\n[publish]\n"


@pytest.fixture
def table(tmp_path: Path) -> JobTable:
    prepare(tmp_path, CONFIG)
    return JobTable(tmp_path / "state" / "jobs.sqlite")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "served") as running:
        yield running


def queue(table: JobTable, folder: Path, config: str = CONFIG) -> str:
    asked = TrainingRequest(config=config, name="job.toml", folder=str(folder), task="counting")
    parsed = asked.parsed()
    request = TrainingRequest(**{**vars(asked), "publish": parsed.asks_to_be_published})
    return submit(table, request, parsed.output).id


def never() -> bool:
    return False


def address(served: Served) -> str:
    return f"http://127.0.0.1:{served.port}"


def verdict(table: JobTable, job_id: str) -> dict[str, Any]:
    job = table.get(job_id)
    assert job.state == "succeeded", job.error
    assert job.result is not None
    assert Path(job.result["file"]).is_file()
    told = [event.data for event in table.events(job_id) if event.name == "publish"]
    assert told == [job.result["publish"]]
    found: dict[str, Any] = told[0]
    return found


def versions(served: Served) -> list[int]:
    answer = served.client.get("/v1/prompts/counting/versions")
    return [] if answer.status_code == 404 else [each["version"] for each in answer.json()["versions"]]


def test_what_is_better_is_published_and_told(tmp_path: Path, table: JobTable, served: Served) -> None:
    job_id = queue(table, tmp_path)
    assert work(table, never, once=True, url=address(served)) == 1
    found = verdict(table, job_id)
    assert (found["name"], found["published"], found["version"]) == ("counting", True, 1)
    job = table.get(job_id)
    assert job.result is not None
    assert served.client.get("/v1/prompts/counting").json()["sha256"] == job.result["sha256"]


def test_what_is_not_better_is_kept(tmp_path: Path, table: JobTable, served: Served) -> None:
    assert served.put("counting", tiny.prompt("counting", kind="answer")).status_code == 201
    job_id = queue(table, tmp_path, CONFIG + "margin = 1.0\n")
    work(table, never, once=True, url=address(served))
    found = verdict(table, job_id)
    assert found["published"] is False
    assert "version 1 scores" in found["reason"]
    assert "margin 1" in found["reason"]
    assert found["served_score"] is not None
    assert versions(served) == [1]


def test_without_the_section_nothing_is_published(tmp_path: Path, table: JobTable, served: Served) -> None:
    job_id = queue(table, tmp_path, CONFIG.replace("[publish]\n", ""))
    work(table, never, once=True, url=address(served))
    job = table.get(job_id)
    assert job.result is not None
    assert job.result["publish"] is None
    assert versions(served) == []


def test_a_worker_that_was_not_told_to_publish_says_so(tmp_path: Path, table: JobTable) -> None:
    job_id = queue(table, tmp_path)
    work(table, never, once=True)
    found = verdict(table, job_id)
    assert found["published"] is False
    assert "promptmux worker --push" in found["reason"]


def test_a_server_that_cannot_be_reached_costs_no_file(tmp_path: Path, table: JobTable) -> None:
    job_id = queue(table, tmp_path)
    work(table, never, once=True, url="http://127.0.0.1:9")
    found = verdict(table, job_id)
    assert found["published"] is False
    assert "Cannot reach http://127.0.0.1:9" in found["reason"]
    assert "The file is kept" in found["reason"]
    job = table.get(job_id)
    assert job.result is not None
    manifest = load_manifest(Path(job.result["file"]), shape=tiny.shape(), fingerprint=None)
    assert manifest.metric == job.result["metric"]


def test_a_key_that_may_not_publish_is_said_so(
    tmp_path: Path, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text(f"bob infer {hashlib.sha256(b'secret').hexdigest()}")
    monkeypatch.setenv("PROMPTMUX_API_KEY", "secret")
    with serving(tmp_path / "served", settings=SETTINGS, keys=Keys.read(tmp_path / "keys")) as served:
        job_id = queue(table, tmp_path)
        work(table, never, once=True, url=address(served))
    found = verdict(table, job_id)
    assert "needs the scope `admin`" in found["reason"]
    assert "secret" not in json.dumps([event.data for event in table.events(job_id)])


def test_what_cannot_be_scored_costs_no_file(
    tmp_path: Path, table: JobTable, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served.put("counting", tiny.prompt("counting", kind="answer")).status_code == 201

    def broken(*_: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("promptmux_server.cli.publish_gate.score_served", broken)
    job_id = queue(table, tmp_path)
    work(table, never, once=True, url=address(served))
    assert "could not be scored" in verdict(table, job_id)["reason"]
    assert versions(served) == [1]


def test_a_disk_that_is_full_for_a_moment_hinders_no_publishing(
    tmp_path: Path, table: JobTable, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, prolong, refused = queue(table, tmp_path), JobTable.prolong, []

    def full_once(table: JobTable, claim: Claim, lease_s: float) -> bool:
        if not refused and threading.current_thread().name != "lease":
            refused.append(claim)
            raise sqlite3.OperationalError("database or disk is full")
        return prolong(table, claim, lease_s)

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(JobTable, "prolong", full_once)
    monkeypatch.setattr(JobTable, "tell", full)
    work(table, never, once=True, url=address(served), lease_s=1000.0, idle_s=0.001)
    job = table.get(job_id)
    assert refused
    assert job.result is not None
    assert job.result["publish"]["published"] is True


class Died(BaseException):
    """The end of a process."""


def test_a_crash_between_publishing_and_telling_publishes_nothing_twice(
    tmp_path: Path, table: JobTable, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = queue(table, tmp_path)

    def die(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patched:
        patched.setattr(JobTable, "succeed", die)
        with pytest.raises(Died):
            work(table, never, once=True, url=address(served))
    assert versions(served) == [1]
    later = JobTable(tmp_path / "state" / "jobs.sqlite", clock=lambda: table.get(job_id).created + 1000)
    assert work(later, never, once=True, url=address(served)) == 1
    job = table.get(job_id)
    assert job.result is not None
    assert job.attempts == 2
    assert (job.result["publish"]["published"], job.result["publish"]["version"]) == (True, 1)
    assert versions(served) == [1]


def test_a_training_that_was_cancelled_at_its_end_is_not_published(
    tmp_path: Path, table: JobTable, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, keep = queue(table, tmp_path), working.keep_learned

    def cancelled(job: Any) -> Any:
        table.cancel(job_id)
        return keep(job)

    monkeypatch.setattr(working, "keep_learned", cancelled)
    work(table, never, once=True, url=address(served))
    assert table.get(job_id).state == "cancelled"
    assert versions(served) == []


def test_a_worker_that_lost_its_lease_publishes_nothing(
    tmp_path: Path, table: JobTable, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = queue(table, tmp_path)

    def lost(table: JobTable, claim: Claim, lease_s: float) -> bool:
        raise LeaseLost("Another worker has it.")

    monkeypatch.setattr(JobTable, "prolong", lost)
    work(table, never, once=True, url=address(served))
    assert table.get(job_id).state == "running"
    assert versions(served) == []
