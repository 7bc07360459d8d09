"""What a training tells over a stream: all of it in order, as it is told, to its end; nobody waits for its readers."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api.live_server import until
from api.registry_server import code
from api.trainings_server import TrainingServer, taking_trainings
from promptmux_server.api import training_events
from promptmux_server.jobs import Claim, JobTable
from promptmux_server.jobs.trainings import KIND

RESULT = {"file": "x", "sha256": "ab", "metric": {}, "publish": None}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    with taking_trainings(tmp_path_factory.mktemp("events")) as server:
        yield server


@pytest.fixture
def server(running: TrainingServer, monkeypatch: pytest.MonkeyPatch) -> TrainingServer:
    running.clear()
    monkeypatch.setattr(training_events, "POLL_S", 0.02)
    return running


def begun(server: TrainingServer) -> Claim:
    """A training that a worker has begun."""
    server.into("runs/a")
    claim = server.table.claim((KIND,), 60.0)
    assert claim is not None
    server.table.begin(claim)
    return claim


def path_of(claim: Claim) -> str:
    return f"/v1/trainings/{claim.job.id}/events"


def frames(text: str) -> list[dict[str, str]]:
    """The events of a stream by field; comments are left out."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block) for block in blocks]


def follow(server: TrainingServer, claim: Claim, **headers: str) -> list[dict[str, str]]:
    response = server.client.get(path_of(claim), headers={k.replace("_", "-"): v for k, v in headers.items()})
    assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    return frames(response.text)


def test_a_finished_training_tells_everything_and_ends(server: TrainingServer) -> None:
    claim = begun(server)
    server.table.tell(claim, "step", {"step": 1, "loss": 0.5})
    server.table.tell(claim, "score", {"step": 1, "value": 0.25})
    server.table.succeed(claim, RESULT)
    events = follow(server, claim)
    assert [event["event"] for event in events] == ["queued", "started", "step", "score", "succeeded"]
    assert [event["id"] for event in events] == ["1", "2", "3", "4", "5"]
    told = json.loads(events[2]["data"])
    assert (told["number"], told["name"], told["data"]) == (3, "step", {"step": 1, "loss": 0.5})
    assert abs(told["at"] - time.time()) < 60
    assert json.loads(events[-1]["data"])["data"] == RESULT


def test_a_stream_is_taken_up_behind_the_last_event(server: TrainingServer) -> None:
    claim = begun(server)
    server.table.succeed(claim, RESULT)
    assert [event["id"] for event in follow(server, claim, last_event_id="2")] == ["3"]
    over = server.client.get(path_of(claim), headers={"last-event-id": "3"})
    assert (over.status_code, over.content) == (204, b"")


def test_a_stream_goes_on_at_another_server_of_the_same_table(server: TrainingServer, tmp_path: Path) -> None:
    claim = begun(server)
    with taking_trainings(tmp_path, state=server.state) as restarted:
        server.table.succeed(claim, RESULT)
        assert [event["event"] for event in follow(restarted, claim, last_event_id="1")] == ["started", "succeeded"]


@pytest.mark.parametrize("number", ["-1", "x", "1.5", "9" * 10, ""])
def test_a_last_event_that_is_no_number_is_refused(server: TrainingServer, number: str) -> None:
    refused = server.client.get(path_of(begun(server)), headers={"last-event-id": number})
    assert code(refused) == (422, "invalid_parameter")


def test_events_come_as_they_are_told(server: TrainingServer) -> None:
    claim = begun(server)
    with server.client.stream("GET", path_of(claim)) as response:
        lines = response.iter_lines()

        def next_event() -> str:
            return next(line for line in lines if line.startswith("event: ")).removeprefix("event: ")

        assert [next_event(), next_event()] == ["queued", "started"]
        for name in ("step", "score"):
            server.table.tell(claim, name, {})
            assert next_event() == name
        server.table.cancel(claim.job.id)
        server.table.give_back(claim)
        assert next_event() == "cancelled"
        assert [line for line in lines if line.startswith("event")] == []


def test_many_events_come_whole(server: TrainingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_events, "PAGE", 3)
    monkeypatch.setattr("promptmux_server.api.trainings.PAGE", 3)
    claim = begun(server)
    for step in range(8):
        server.table.tell(claim, "step", {"step": step})
    server.table.succeed(claim, RESULT)
    assert [int(event["id"]) for event in follow(server, claim)] == list(range(1, 12))


def test_silence_is_broken_by_comments(server: TrainingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_events, "KEEP_ALIVE_S", 0.1)
    claim = begun(server)
    with server.client.stream("GET", path_of(claim)) as response:
        lines = response.iter_lines()
        for _ in range(2):
            assert next(line for line in lines if line.startswith(":")) == ": keep-alive"


def watching(server: TrainingServer) -> int:
    """Streams that the server has open."""
    desk: Any = server.application.asgi
    routes = {route.path: route for route in desk._app.routes}
    endpoint = routes["/v1/trainings/{id}/events"].endpoint
    found = endpoint.__closure__[0].cell_contents
    return int(found._watchers)


def test_a_reader_that_has_gone_is_forgotten(server: TrainingServer) -> None:
    claim = begun(server)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"GET {path_of(claim)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b"200 OK" in connection.recv(4096)
        until(lambda: watching(server) == 1)
    until(lambda: watching(server) == 0)
    server.table.succeed(claim, RESULT)


def test_a_reader_that_takes_nothing_is_let_go_and_nothing_is_read_for_it(
    server: TrainingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_events, "STALL_S", 0.3)
    monkeypatch.setattr(training_events, "PAGE", 20)
    monkeypatch.setattr("promptmux_server.api.trainings.PAGE", 20)
    claim = begun(server)
    reads: list[int] = []
    events = JobTable.events

    def counted(table: JobTable, job_id: str, after: int = 0, limit: int = 2000) -> Any:
        reads.append(after)
        return events(table, job_id, after, limit)

    monkeypatch.setattr(JobTable, "events", counted)
    for _ in range(60):
        server.table.tell(claim, "step", {"long": "x" * 100_000})
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(f"GET {path_of(claim)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        until(lambda: watching(server) == 1)
        assert server.client.get("/livez").status_code == 200
        until(lambda: watching(server) == 0)
    assert len(reads) <= 3
    server.table.succeed(claim, RESULT)


def test_a_server_that_goes_ends_its_streams(server: TrainingServer) -> None:
    claim, texts = begun(server), []
    thread = threading.Thread(target=lambda: texts.append(httpx2.get(url, timeout=20).text))
    url = f"http://127.0.0.1:{server.port}{path_of(claim)}"
    thread.start()
    until(lambda: watching(server) == 1)
    server.application.lifecycle.draining = True
    try:
        thread.join(10)
        assert [frame["event"] for frame in frames(texts[0])] == ["queued", "started"]
    finally:
        server.application.lifecycle.draining = False


def test_a_table_that_fails_under_a_stream_ends_it(server: TrainingServer) -> None:
    claim = begun(server)
    with server.client.stream("GET", path_of(claim)) as response:
        lines = response.iter_lines()
        assert next(lines) == "id: 1"
        server.clear()
        list(lines)
    assert server.client.get("/livez").status_code == 200
