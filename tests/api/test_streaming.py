"""Answers as server-sent events: over real sockets where a reader matters, over plain ASGI where it must not read."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from starlette.types import Message

from api.fake_engine import FakeEngine
from api.live_server import live_server, until
from promptmux_server.api import documents, edge, streaming
from promptmux_server.api.app import build_app
from promptmux_server.api.call import Call, CallItem
from promptmux_server.api.streaming import EventBuffer
from promptmux_server.errors import NonfiniteOutput
from promptmux_server.settings import Settings

Event = tuple[str, dict[str, Any]]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[httpx2.Client]:
    app = build_app(engine, Settings(queue_size=8), "fake")
    with live_server(app.asgi) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}") as connected:
        yield connected


def events(text: str) -> list[Event]:
    """The events of a whole stream, comments left out."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    parts = [block.split("\n") for block in blocks]
    assert all(len(part) == 2 for part in parts)
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


def ask(client: httpx2.Client, *items: dict[str, Any], **options: Any) -> httpx2.Response:
    return client.post("/v1/predict", json={"items": list(items), "stream": True, **options})


# -- what is sent ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/predict", {"task": "spell", "text": "a dög"}),
        ("/v1/predict", {"items": [{"task": "spell", "text": "a dög"}]}),
        ("/v1/fanout", {"tasks": ["spell"], "text": "a dög"}),
    ],
    ids=["bare item", "items", "fan-out"],
)
def test_a_text_comes_in_pieces_then_whole_then_the_end(client: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    response = client.post(path, json={**body, "stream": True}, headers={"x-request-id": "mine"})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"] == "mine"
    *deltas, answer, done = events(response.text)
    assert deltas == [("delta", {"id": "0", "text": letter}) for letter in "a dög"]
    assert answer[0] == "answer"
    documents.AnsweredItem.model_validate_json(json.dumps(answer[1]))
    assert answer[1]["output"]["text"] == "a dög"
    assert done == ("done", {"request_id": "mine"})


def test_an_answer_in_a_stream_is_the_answer_of_the_whole_form(client: httpx2.Client) -> None:
    items = [{"task": "echo", "text": "x", "id": "first"}, {"task": "nobody"}]
    whole = client.post("/v1/predict", json={"items": items}, headers={"x-request-id": "r"}).json()["answers"]
    streamed = events(
        client.post("/v1/predict", json={"items": items, "stream": True}, headers={"x-request-id": "r"}).text
    )
    assert sorted((data for name, data in streamed if name == "answer"), key=lambda data: data["id"]) == sorted(
        whole, key=lambda data: data["id"]
    )


def test_items_end_when_they_end_and_each_has_its_own_pieces(client: httpx2.Client) -> None:
    response = ask(client, {"task": "slow"}, {"task": "spell", "text": "ab"}, {"task": "echo"}, deadline_ms=300)
    found = events(response.text)
    assert [data["id"] for name, data in found if name == "answer"][-1] == "0"
    assert [data for name, data in found if name == "delta"] == [{"id": "1", "text": "a"}, {"id": "1", "text": "b"}]
    late = next(data for name, data in found if name == "answer" and data["id"] == "0")
    assert late["error"]["code"] == "deadline_exceeded"
    assert found[-1][0] == "done"


def test_the_first_piece_arrives_while_the_text_is_still_written(client: httpx2.Client, engine: FakeEngine) -> None:
    heard = b""
    with client.stream("POST", "/v1/predict", json={"task": "pause", "text": "abc", "stream": True}) as response:
        parts = response.iter_bytes()
        while b'"text": "b"' not in heard:
            heard += next(parts)
        assert b"answer" not in heard
        engine.release.set()
        heard += b"".join(parts)
    assert [name for name, _ in events(heard.decode())] == ["delta"] * 3 + ["answer", "done"]


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "status", "code"),
    [
        ([{"task": "nobody"}], 404, "prompt_not_found"),
        ([{"task": "echo", "image": "no picture"}, {"task": "nobody"}], 400, "malformed_image"),
        ([{"task": "broken"}], 500, "internal"),
        ([{"task": "echo"}] * 9, 503, "overloaded"),
        ([{"task": 3}], 422, "invalid_parameter"),
    ],
    ids=["no such task", "no picture", "a bug", "too many", "not of the schema"],
)
def test_an_error_before_anything_was_admitted_is_an_ordinary_answer(
    client: httpx2.Client, items: list[dict[str, Any]], status: int, code: str
) -> None:
    response = ask(client, *items)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["content-type"] == "application/json"
    documents.ErrorBody.model_validate_json(response.text)


def test_an_error_after_something_was_admitted_is_an_event(client: httpx2.Client) -> None:
    response = ask(client, {"task": "nan"}, {"task": "nobody"}, {"task": "broken"})
    assert response.status_code == 200
    found = {data["id"]: data["error"]["code"] for name, data in events(response.text) if name == "answer"}
    assert found == {"0": "nonfinite_output", "1": "prompt_not_found", "2": "internal"}
    assert "secret" not in response.text


def test_pieces_after_an_items_end_are_not_sent() -> None:
    """The engine may write on for a step after a deadline has passed."""

    async def scenario() -> None:
        items = (CallItem(id="a", task="echo"), CallItem(id="b", task="echo"))
        call = Call(request_id="r", items=items, deadline=0.0, key="", priority="interactive")
        buffer = EventBuffer(call, 9)
        buffer.text(0, "in time")
        buffer.answered(0, NonfiniteOutput("No."))
        buffer.text(0, "too late")
        buffer.text(1, "in time")
        buffer.end([NonfiniteOutput("No.")] * 2)
        found = events(b"".join([chunk async for chunk in buffer.chunks()]).decode())
        assert [(name, data.get("id")) for name, data in found] == [
            ("delta", "a"), ("answer", "a"), ("delta", "b"), ("done", None),
        ]  # fmt: skip

    in_a_loop(scenario)


# -- readers that leave or do not read ------------------------------------------------------------------------------


def test_a_reader_that_leaves_cancels_everything(client: httpx2.Client, engine: FakeEngine) -> None:
    body = json.dumps({"items": [{"task": "slow"}] * 2 + [{"task": "pause", "text": "abc"}], "stream": True}).encode()
    assert client.base_url.port is not None
    with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=10) as connection:
        head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        heard = b""
        while b"delta" not in heard:
            heard += connection.recv(4096)
        until(lambda: len(engine.futures) == 3)
    until(lambda: all(future.cancelled() for future in engine.futures))
    engine.release.set()
    assert len(events(ask(client, *[{"task": "echo"}] * 8).text)) == 9  # every place is free again


class Connection:
    """One ASGI request whose reader does as it is told."""

    def __init__(self, asgi: Any, body: dict[str, Any]) -> None:
        self._asgi, self._body = asgi, json.dumps(body).encode()
        self.sent: list[Message] = []
        self.may_read, self.has_left = asyncio.Event(), asyncio.Event()
        self.may_read.set()

    async def run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/predict",
            "raw_path": b"/v1/predict",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self._body))],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await self._asgi(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if self._body:
            body, self._body = self._body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            await self.may_read.wait()
        self.sent.append(message)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def is_complete(self) -> bool:
        return bool(self.sent) and not self.sent[-1].get("more_body", True)


@asynccontextmanager
async def asking(asgi: Any, body: dict[str, Any]) -> AsyncIterator[tuple[Connection, asyncio.Task[None]]]:
    connection = Connection(asgi, body)
    task = asyncio.create_task(connection.run())
    try:
        yield connection, task
    finally:
        task.cancel()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def in_a_loop(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


LETTERS = "x" * 40


@pytest.mark.parametrize("pieces", [39, 40], ids=["too few", "enough"])
def test_a_reader_too_slow_loses_its_stream_and_nobody_else_does(engine: FakeEngine, pieces: int) -> None:
    """Nothing is read until all is said. The last letter waits for `release`, so nothing has ended by itself."""
    app = build_app(engine, Settings(max_stream_pieces=pieces), "fake").asgi

    async def scenario() -> None:
        async with (
            asking(app, {"task": "pause", "text": LETTERS + "y", "stream": True}) as (slow, slow_task),
            asking(app, {"task": "pause", "text": "ab", "stream": True}) as (neighbour, neighbour_task),
        ):
            slow.may_read.clear()
            await eventually(lambda: "delta" in neighbour.text)
            if pieces < len(LETTERS):
                # The first letters may have been taken by the writer, who is stuck with them: ask for more of them.
                await eventually(lambda: slow_task.done() or slow_overflows(engine))
                await slow_task
                assert not slow.is_complete
                assert engine.futures[0].cancelled()
            engine.release.set()
            slow.may_read.set()
            await neighbour_task
            assert events(neighbour.text)[-1][0] == "done"
            if pieces >= len(LETTERS):
                await slow_task
                assert events(slow.text)[-1][0] == "done"

    in_a_loop(scenario)


def slow_overflows(engine: FakeEngine) -> bool:
    """Say one more letter for the reader who does not read."""
    request = engine.requests[0]
    assert request.on_text is not None
    request.on_text("x")
    return False


def test_the_engine_never_waits_for_a_reader(engine: FakeEngine) -> None:
    app = build_app(engine, Settings(), "fake").asgi

    async def scenario() -> None:
        async with asking(app, {"task": "slow", "stream": True}) as (connection, _):
            connection.may_read.clear()
            await eventually(lambda: bool(engine.requests))
            started = time.monotonic()
            for _ in range(100):
                slow_overflows(engine)  # on the event loop's own thread: were it to wait, it would wait for ever
            assert time.monotonic() - started < 1.0

    in_a_loop(scenario)


def test_a_cancelled_request_does_not_wait_for_ever_to_say_so(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's end cancels a stream that has not begun: the answer that says so finds nobody who reads."""
    monkeypatch.setattr(edge, "LAST_WORD_S", 0.05)
    app = build_app(engine, Settings(), "fake").asgi
    engine.submit = lambda request: time.sleep(0.2) or Future()  # type: ignore[method-assign, func-returns-value]

    async def scenario() -> None:
        async with asking(app, {"task": "slow", "stream": True}) as (connection, task):
            connection.may_read.clear()
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait_for(task, 5)
            assert [message["status"] for message in connection.sent] == [503]

    in_a_loop(scenario)


def test_a_stream_without_a_reader_ends_after_a_while(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STALL_S", 0.05)
    app = build_app(engine, Settings(), "fake").asgi

    async def scenario() -> None:
        async with asking(app, {"task": "spell", "text": "a", "stream": True}) as (connection, task):
            connection.may_read.clear()
            await asyncio.wait_for(task, 20)
            assert not connection.is_complete

    in_a_loop(scenario)


def test_silence_is_broken_by_comments(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.02)
    app = build_app(engine, Settings(), "fake").asgi

    async def scenario() -> None:
        async with asking(app, {"task": "slow", "stream": True}) as (connection, task):
            await eventually(lambda: connection.text.count(": keep-alive\n\n") >= 3)
            engine.release.set()
            await task
            assert [name for name, _ in events(connection.text)] == ["answer", "done"]

    in_a_loop(scenario)


def test_a_stream_that_is_written_only_takes_nobodys_place(engine: FakeEngine) -> None:
    """Its items have ended: what its reader still has to read keeps no one out."""
    app = build_app(engine, Settings(queue_size=1), "fake").asgi

    async def scenario() -> None:
        async with asking(app, {"task": "echo", "text": "x", "stream": True}) as (slow, slow_task):
            slow.may_read.clear()
            await eventually(lambda: bool(engine.futures) and engine.futures[0].done())
            async with asyncio.timeout(20):
                while await status_of(app) != 200:
                    await asyncio.sleep(0.005)
            assert not slow.is_complete
            slow.may_read.set()
            await slow_task
            assert slow.is_complete

    in_a_loop(scenario)


async def status_of(asgi: Any) -> int:
    async with asking(asgi, {"task": "echo", "text": "y"}) as (connection, task):
        await task
    status: int = connection.sent[0]["status"]
    return status
