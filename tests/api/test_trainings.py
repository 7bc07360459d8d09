"""Trainings over HTTP: what is taken, what is refused and why; the table is that of workers and commands."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from api.registry_server import code
from api.trainings_server import CONFIG, TrainingServer, taking_trainings
from promptmux_server.api import trainings as routes
from promptmux_server.api.keys import Keys
from promptmux_server.cli import app as commands
from promptmux_server.errors import TrainingConfigError
from promptmux_server.jobs import FILE, JobTable
from promptmux_server.jobs.trainings import KIND, TrainingRequest, submit
from promptmux_server.settings import Settings
from promptmux_server.training.job_config import parse_job

ADMIN, INFER = "key-of-the-trainer", "key-of-a-caller"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    with taking_trainings(tmp_path_factory.mktemp("trainings")) as server:
        yield server


@pytest.fixture
def server(running: TrainingServer) -> TrainingServer:
    """With no table, and nothing in its folder."""
    running.clear()
    return running


# -- Taken


def test_a_training_is_queued_as_it_was_sent(server: TrainingServer) -> None:
    taken = server.post(priority=3, metadata={"run": "first"})
    job = taken.json()
    assert taken.status_code == 201
    assert taken.headers["location"] == f"/v1/trainings/{job['id']}"
    assert server.client.get(taken.headers["location"]).json() == job
    assert job | {"id": "", "created_at": 0} == {
        "id": "",
        "object": "training",
        "task": "pets",
        "status": "queued",
        "cancel_requested": False,
        "priority": 3,
        "publish": False,
        "author": "local",
        "attempts": 0,
        "max_attempts": 3,
        "created_at": 0,
        "started_at": None,
        "finished_at": None,
        "metadata": {"run": "first"},
        "result": None,
        "error": None,
        "config": CONFIG,
    }


def test_a_configuration_may_be_an_object(server: TrainingServer) -> None:
    document = tomllib.loads(CONFIG)
    job = server.post(document).json()
    assert job["config"] == document
    (queued,) = server.table.newest(1)
    of_object = parse_job(queued.payload["config"], queued.payload["name"], server.root)
    assert of_object == parse_job(CONFIG, "config.toml", server.root)


@pytest.mark.parametrize("asks", ["[publish]\n", "[publish]\nmargin = 0.1\n", ""])
def test_a_section_asks_for_publishing(server: TrainingServer, asks: str) -> None:
    assert server.post(CONFIG + asks).json()["publish"] is bool(asks)


def test_commands_and_workers_see_the_same_table(server: TrainingServer) -> None:
    job_id = server.into("runs/pets")["id"]
    shown = CliRunner().invoke(commands, ["jobs", "list", "--json", "--state", str(server.state)])
    assert [job["id"] for job in json.loads(shown.stdout)] == [job_id]
    claim = server.table.claim((KIND,), 60.0)
    assert claim is not None
    server.table.begin(claim)
    job = server.client.get(f"/v1/trainings/{job_id}").json()
    assert (job["status"], job["attempts"]) == ("running", 1)
    assert job["started_at"] >= job["created_at"]
    server.table.fail(claim, "training_diverged", f"at {server.root.resolve()}/pets")
    job = server.client.get(f"/v1/trainings/{job_id}").json()
    assert job["status"] == "failed"
    assert job["error"] == {"code": "training_diverged", "message": "at pets", "param": None}
    assert job["finished_at"] is not None


def test_a_result_names_no_folder_of_the_server(server: TrainingServer) -> None:
    server.into("runs/pets")
    claim = server.table.claim((KIND,), 60.0)
    assert claim is not None
    file = server.root.resolve() / "runs/pets/pets.safetensors"
    server.table.succeed(claim, {"file": str(file), "sha256": "ab", "metric": {}, "publish": None})
    job = server.client.get(f"/v1/trainings/{claim.job.id}")
    events = server.client.get(f"/v1/trainings/{claim.job.id}/events")
    assert job.json()["result"]["file"] == "runs/pets/pets.safetensors"
    assert str(server.root) not in job.text + events.text


def test_a_job_that_a_command_queued_is_shown_without_its_places(server: TrainingServer) -> None:
    request = TrainingRequest(config=CONFIG, name="pets.toml", folder="/home/ann", task="pets")
    job = submit(JobTable(server.state / FILE), request, server.root)
    claim = server.table.claim((KIND,), 60.0)
    assert claim is not None
    server.table.succeed(claim, {"file": "/data/out/pets.safetensors", "sha256": "ab", "metric": {}, "publish": None})
    shown = server.client.get(f"/v1/trainings/{job.id}").json()
    assert (shown["task"], shown["result"]["file"]) == ("pets", "pets.safetensors")


def test_a_repeated_key_gives_the_same_training_and_no_other(server: TrainingServer) -> None:
    first = server.post(key="k-1")
    again = server.post(key="k-1")
    assert (again.status_code, again.json()) == (201, first.json())
    assert code(server.post(key="k-1", priority=1)) == (409, "idempotency_conflict")
    assert code(server.post(CONFIG.replace("runs/pets", "runs/other"), key="k-1")) == (409, "idempotency_conflict")
    assert len(server.table.newest(9)) == 1


@pytest.mark.parametrize("key", ["", "two words", "x" * 256, "é".encode()])
def test_a_key_that_cannot_be_one_is_refused(server: TrainingServer, key: Any) -> None:
    refused = server.client.post("/v1/trainings", json={"config": CONFIG}, headers={"idempotency-key": key})
    assert code(refused) == (422, "invalid_parameter")
    assert refused.json()["error"]["param"] == "Idempotency-Key"


def test_two_trainings_do_not_share_an_output_folder(server: TrainingServer) -> None:
    first = server.into("runs/a")
    refused = server.post(CONFIG.replace("runs/pets", "runs/../runs/a"))
    assert code(refused) == (409, "job_conflict")
    assert first["id"] in refused.json()["error"]["message"]
    server.into("runs/b")
    server.client.delete(f"/v1/trainings/{first['id']}")
    server.into("runs/a")


def test_a_key_has_so_many_trainings_that_wait(tmp_path: Path) -> None:
    with taking_trainings(tmp_path, trainings_per_key=2) as server:
        first = server.into("a")
        server.into("b")
        refused = server.post()
        assert code(refused) == (429, "tenant_queue_full")
        assert refused.headers["retry-after"] == "30"
        server.client.delete(f"/v1/trainings/{first['id']}")
        server.into("c")


# -- Looked at and ended


def test_a_list_is_newest_first_by_pages_and_by_status(server: TrainingServer) -> None:
    ids = [server.into(f"runs/{n}")["id"] for n in range(5)][::-1]
    server.client.delete(f"/v1/trainings/{ids[0]}")

    def page(**query: Any) -> tuple[list[str], str | None]:
        body = server.client.get("/v1/trainings", params=query).json()
        assert all("config" not in job for job in body["trainings"])
        return [job["id"] for job in body["trainings"]], body["next"]

    assert page() == (ids, None)
    assert page(limit=2) == (ids[:2], ids[1])
    assert page(limit=2, after=ids[1]) == (ids[2:4], ids[3])
    assert page(limit=2, after=ids[3]) == (ids[4:], None)
    assert page(status="cancelled") == (ids[:1], None)
    assert page(status="queued", limit=4) == (ids[1:], None)


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ({"limit": "0"}, 422, "limit"),
        ({"limit": "101"}, 422, "limit"),
        ({"status": "done"}, 422, "status"),
        ({"after": "x" * 256}, 422, "after"),
        ({"after": "nobody"}, 404, None),
    ],
)
def test_a_page_that_there_is_not_is_refused(
    server: TrainingServer, query: dict[str, str], status: int, param: str | None
) -> None:
    server.into("runs/a")
    refused = server.client.get("/v1/trainings", params=query)
    assert (code(refused)[0], refused.json()["error"]["param"]) == (status, param)


def test_ending_a_training_twice_is_ending_it_once(server: TrainingServer) -> None:
    waiting, running = server.into("runs/a", priority=1)["id"], server.into("runs/b", priority=2)["id"]
    claim = server.table.claim((KIND,), 60.0)
    assert claim is not None
    assert claim.job.id == running
    for _ in range(2):
        ended = server.client.delete(f"/v1/trainings/{waiting}")
        asked = server.client.delete(f"/v1/trainings/{running}").json()
        assert (ended.status_code, ended.json()["status"]) == (200, "cancelled")
        assert (asked["status"], asked["cancel_requested"]) == ("running", True)
    server.table.give_back(claim)
    assert server.client.delete(f"/v1/trainings/{running}").json()["status"] == "cancelled"
    assert [event.name for event in server.table.events(waiting)] == ["queued", "cancelled"]


def test_unknown_ids_and_other_work_are_not_found(server: TrainingServer) -> None:
    server.into("runs/a")
    other = server.table.submit("evaluation", {}).id
    for job_id in (other, "nobody", "%00", "..", "x" * 3000):
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
            refused = server.client.request(method, f"/v1/trainings/{job_id}{path}")
            assert code(refused)[0] == 404, (job_id, path)
    assert server.table.get(other).state == "queued"
    assert len(server.client.get("/v1/trainings").json()["trainings"]) == 1


# -- Refused


def test_without_a_folder_for_them_trainings_are_off(tmp_path: Path) -> None:
    with taking_trainings(tmp_path, training_root=None) as server:
        refused = server.post()
        assert code(refused) == (403, "trainings_off")
        assert "PROMPTMUX_TRAINING_ROOT" in refused.json()["error"]["message"]
        assert not server.state.exists()


def test_a_key_that_may_ask_may_not_train(tmp_path: Path) -> None:
    lines = [f"{n} {s} {hashlib.sha256(k.encode()).hexdigest()}" for n, s, k in
             (("ann", "admin", ADMIN), ("bob", "infer,eval", INFER))]  # fmt: skip
    (tmp_path / "keys").write_text("\n".join(lines))
    with taking_trainings(tmp_path, Keys.read(tmp_path / "keys")) as server:
        server.client.headers["authorization"] = f"Bearer {INFER}"
        assert code(server.post()) == (403, "forbidden")
        server.client.headers["authorization"] = f"Bearer {ADMIN}"
        job = server.into("runs/a")
        assert job["author"] == "ann"
        server.client.headers["authorization"] = f"Bearer {INFER}"
        for method, path in (("GET", ""), ("GET", f"/{job['id']}"), ("DELETE", f"/{job['id']}")):
            assert code(server.client.request(method, f"/v1/trainings{path}")) == (403, "forbidden")
        assert server.table.get(job["id"]).state == "queued"


@pytest.mark.parametrize(
    ("before", "after", "param"),
    [
        ("heldout", "holdout", "config.data"),
        ("steps = 500", 'steps = "500"', "config.steps.steps"),
        ('kind = "answer"\n', "", "config.task.kind"),
        ('path = "pets.jsonl"', "path = 3", "config.data.train.0.path"),
        ("steps = 500", "steps = ", "config"),
        ("steps = 500", "steps = 2026-01-01", "config"),
    ],
)
def test_a_mistake_is_told_as_the_command_tells_it(server: TrainingServer, before: str, after: str, param: str) -> None:
    config = CONFIG.replace(before, after, 1)
    with pytest.raises(TrainingConfigError) as said:
        parse_job(config, "config.toml", server.root)
    refused = server.post(config)
    assert code(refused) == (422, "invalid_training_config")
    error = refused.json()["error"]
    assert error["message"] == said.value.message[:300]
    assert "line" in error["message"] or "date" in error["message"]
    assert error["param"] == param
    assert not (server.state / "jobs.sqlite").exists()


def test_several_mistakes_are_told_for_programs_too(server: TrainingServer) -> None:
    refused = server.post(CONFIG.replace("heldout", "holdout").replace("500", "0.5"))
    mistakes = refused.json()["error"]["details"]["mistakes"]
    assert {(each["field"], each["line"]) for each in mistakes} == {("data.holdout", 8), ("steps.steps", 15)}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "config"),
        ({"config": 3}, "config"),
        ({"config": None}, "config"),
        ({"config": CONFIG, "priority": 1001}, "priority"),
        ({"config": CONFIG, "priority": "1"}, "priority"),
        ({"config": CONFIG, "metadata": {"a": 1}}, "metadata"),
        ({"config": CONFIG, "metadata": {"a": "x" * 513}}, "metadata"),
        ({"config": CONFIG, "metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"config": CONFIG, "surprise": 1}, None),
        ([], None),
    ],
)
def test_a_body_that_is_no_training_is_refused(server: TrainingServer, body: Any, param: str | None) -> None:
    refused = server.client.post("/v1/trainings", json=body)
    assert code(refused) == (422, "invalid_parameter")
    assert (refused.json()["error"]["param"] or "").split(".")[0] == (param or "")


@pytest.mark.parametrize(
    "config",
    [
        "#" * (256 * 1024) + "\n" + CONFIG,
        ".".join("a" * 60_000) + " = 1",
        "a = " + "[" * 100_000,
        "\x00\x07é" * 50 + "= 1",
        "".join(f"k{n} = 1\n" for n in range(20_000)),
        '"' + "é" * 5000 + '" = 1',
        {"\U0001f600" * 300: 1},
        {"output": "x" * 100_000, "task": {"name": "a", "kind": "answer"}},
    ],
    ids=["large", "dotted", "nested", "binary", "unknown fields", "long name", "odd name", "long path"],
)
def test_a_monstrous_configuration_is_refused_at_once(server: TrainingServer, config: Any) -> None:
    refused = server.post(config)
    assert code(refused) == (422, "invalid_training_config")
    assert refused.elapsed.total_seconds() < 5


def test_garbage_is_never_a_fault_of_the_server(server: TrainingServer) -> None:
    rng = random.Random(20261126)
    good = json.dumps({"config": CONFIG, "priority": 1}).encode()
    pieces = [b"NaN", b"\xff", b"{", b"]", b'"', b"\\ud800", b"1e999", b"[" * 50, b"\\u0000", b"''", b"="]
    for _ in range(300):
        body = bytearray(good)
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.randrange(len(body) + 1)
            body[place : place + rng.choice((0, 0, 9))] = rng.choice(pieces)
        sent = bytes(body[: rng.choice((len(body), len(body), rng.randrange(len(body))))])
        answer = server.client.post("/v1/trainings", content=sent, headers={"content-type": "application/json"})
        assert answer.status_code in (201, 400, 409, 422), sent
        assert answer.status_code == 201 or len(answer.content) <= 4096


# -- Paths


@contextmanager
def unconfined() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("promptmux_server.jobs.trainings.confine", lambda *_: None)
        yield


FIELDS = {
    "backbone": lambda path: f'backbone = "{path}"\n' + CONFIG,
    "output": lambda path: CONFIG.replace("runs/pets", path),
    "cache": lambda path: f'cache = "{path}"\n' + CONFIG,
    "data.train.0.path": lambda path: CONFIG.replace('"pets.jsonl"', f'"{path}"'),
    "data.train.0.images": lambda path: CONFIG.replace('"pictures"', f'"{path}"'),
    "data.train.0.annotations": lambda path: CONFIG.replace("images =", f'annotations = "{path}"\nimages ='),
    "begin.among": lambda path: CONFIG + f'[begin]\nnearest = 1\namong = "{path}"\n',
    "begin.prompt": lambda path: CONFIG + f'[begin]\nprompt = "{path}/p.safetensors"\n',
    "data.validation.path": lambda path: CONFIG.replace("[steps]", f'[data.validation]\npath = "{path}"\n[steps]'),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_path_that_leads_out_of_the_folder_is_refused(server: TrainingServer, tmp_path: Path, field: str) -> None:
    (tmp_path / "secret").mkdir()
    (server.root / "link").symlink_to(tmp_path / "secret")
    (server.root / "inside").mkdir()
    (server.root / "near").symlink_to(server.root / "inside")
    (server.root / "ring").symlink_to(server.root / "ring")
    outside = [
        tmp_path / "secret",
        "/etc",
        "..",
        "../secret",
        "a/../../secret",
        "link",
        "link/x",
        "near/../../x",
        "ring",
    ]
    for path in (*outside, "a\\u0000b"):
        refused = server.post(FIELDS[field](str(path)))
        assert code(refused) == (422, "invalid_training_config"), path
        assert refused.json()["error"]["param"] == f"config.{field}"
        assert str(tmp_path) not in refused.text
    with unconfined():  # the control: nothing else refuses it
        control = server.post(FIELDS[field]("../secret"))
        assert control.status_code == 201
    server.client.delete(f"/v1/trainings/{control.json()['id']}")
    for number, path in enumerate((f"{server.root}/inside", "near/x", "a/../inside", "not-there-yet")):
        config = FIELDS[field](path)
        if field != "output":
            config = config.replace("runs/pets", f"runs/{number}")
        taken = server.post(config)
        assert taken.status_code == 201, taken.text
        server.client.delete(f"/v1/trainings/{taken.json()['id']}")


@pytest.mark.parametrize(
    ("begin", "field"),
    [
        ('prompt = "../../secret/p"\namong = "prompts"', "begin.prompt"),
        ('prompt = "p"\namong = "http://127.0.0.1:9"', "begin.among"),
        ('nearest = 1\namong = "https://elsewhere.example"', "begin.among"),
    ],
)
def test_no_prompt_from_elsewhere_is_begun_from(server: TrainingServer, begin: str, field: str) -> None:
    refused = server.post(CONFIG + f"[begin]\n{begin}\n")
    assert code(refused) == (422, "invalid_training_config")
    assert refused.json()["error"]["param"] == f"config.{field}"
    with unconfined():  # the control: nothing else refuses it
        assert server.post(CONFIG + f"[begin]\n{begin}\n").status_code == 201


def test_a_folder_for_trainings_is_not_that_of_the_servers_state(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "state"):
        with pytest.raises(ValueError, match="holds the state directory"):
            Settings(training_root=root, state=tmp_path / "state")
    assert Settings(training_root=tmp_path / "state" / "trainings", state=tmp_path / "state").training_root


def test_an_output_folder_with_other_things_in_it_is_refused(server: TrainingServer) -> None:
    (server.root / "pets").mkdir()
    server.into("pets")
    (server.root / "pets" / "config.toml").touch()
    for output in ("pets", "pets/config.toml"):
        refused = server.post(CONFIG.replace("runs/pets", output))
        assert (code(refused)[0], refused.json()["error"]["param"]) == (422, "config.output")
    server.client.delete(f"/v1/trainings/{server.table.newest(1)[0].id}")
    (server.root / "pets" / "checkpoints").mkdir()
    server.into("pets")


# -- The table and the disk


def test_a_table_that_nobody_made_is_empty_and_is_not_made_by_looking(server: TrainingServer) -> None:
    assert server.client.get("/v1/trainings").json() == {"trainings": [], "next": None}
    for method, path in (("GET", "/x"), ("DELETE", "/x"), ("GET", "/x/events"), ("GET", "?after=x")):
        assert code(server.client.request(method, f"/v1/trainings{path}"))[0] == 404
    assert not server.state.exists()


def test_a_table_of_an_earlier_version_is_taken_over(server: TrainingServer) -> None:
    job_id = server.into("runs/a")["id"]
    database = sqlite3.connect(server.state / "jobs.sqlite", isolation_level=None)
    for column in ("started", "finished", "folder", "not_before", "claims"):
        database.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
    database.close()
    assert JobTable(server.state / "jobs.sqlite").get(job_id).started is None
    assert server.client.get(f"/v1/trainings/{job_id}").json()["status"] == "queued"


def test_a_state_folder_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with taking_trainings(tmp_path) as server:
        refused = server.post()
        assert code(refused) == (503, "storage_failed")
        assert str(tmp_path) not in refused.text
        assert server.client.get("/livez").status_code == 200


def test_a_table_that_is_none_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "jobs.sqlite").write_bytes(b"no database" * 1000)
    with taking_trainings(tmp_path) as server:
        for refused in (server.post(), server.client.get("/v1/trainings"), server.client.get("/v1/trainings/x")):
            assert code(refused) == (503, "storage_failed")


def test_a_folder_of_trainings_that_has_gone_is_said_so(server: TrainingServer) -> None:
    server.root.rmdir()
    assert code(server.post()) == (503, "storage_failed")


def test_a_full_disk_takes_no_training_and_loses_none(server: TrainingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = server.into("runs/a")
    connected = JobTable._connected

    @contextmanager
    def full(table: JobTable) -> Iterator[sqlite3.Connection]:
        with connected(table) as database:
            (pages,) = database.execute("PRAGMA page_count").fetchone()
            database.execute(f"PRAGMA max_page_count = {pages}")
            yield database

    with monkeypatch.context() as patched:
        patched.setattr(JobTable, "_connected", full)
        refused = server.post("#" * 100_000 + "\n" + CONFIG.replace("runs/pets", "runs/b"))
        assert code(refused) == (507, "storage_full")
    assert [job.id for job in server.table.newest(9)] == [kept["id"]]
    server.into("runs/b")


def test_a_table_that_is_held_holds_up_nobody_else(server: TrainingServer) -> None:
    server.into("runs/a")
    holder = sqlite3.connect(server.state / "jobs.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    answers: list[httpx2.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(server.post(CONFIG.replace("runs/pets", "runs/b"))))
    waiting.start()
    for _ in range(5):
        assert server.client.get("/livez").elapsed.total_seconds() < 2.0
        assert server.client.get("/v1/trainings").status_code == 200  # readers do not wait in WAL mode
    assert not answers
    holder.execute("COMMIT")
    holder.close()
    waiting.join(20)
    assert answers[0].status_code == 201


def test_a_server_that_goes_takes_nothing_more(server: TrainingServer) -> None:
    server.application.lifecycle.draining = True
    try:
        assert code(server.post()) == (503, "draining")
    finally:
        server.application.lifecycle.draining = False


def test_only_so_many_follow_at_one_time(server: TrainingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MOST_WATCHERS", 0)
    job_id = server.into("runs/a")["id"]
    assert code(server.client.get(f"/v1/trainings/{job_id}/events")) == (503, "overloaded")
