"""The client's fan-out and streams, in both clients, against scripted transports and a socket that breaks off."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from promptmux import (
    Answer,
    AsyncClient,
    Client,
    ConnectionFailed,
    Delta,
    Item,
    NotFound,
    RateLimited,
    RequestTimeout,
    ServerError,
)
from promptmux._retry import RetryPolicy

NO_WAIT = RetryPolicy(first_delay_s=0.0)
ANSWER = {"id": "0", "task": "cap", "output": {"kind": "caption", "text": "a dog"}, "score": -0.5}
FAILED = {"id": "1", "task": "vqa", "error": {"code": "prompt_not_found", "message": "No such task."}}


def event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


DELTAS = event("delta", {"id": "0", "text": "a"}) + ": keep-alive\n\n" + event("delta", {"id": "0", "text": " dog"})
DONE = event("done", {"request_id": "r"})
WHOLE = DELTAS + event("answer", ANSWER) + event("of_a_newer_server", [1]) + DONE


def stream(text: str) -> httpx2.Response:
    return httpx2.Response(200, text=text, headers={"content-type": "text/event-stream"})


class Script:
    """A transport that answers in turn and keeps what was sent."""

    def __init__(self, *responses: httpx2.Response) -> None:
        self.responses = list(responses)
        self.bodies: list[Any] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.bodies.append((request.url.path, json.loads(request.content)))
        return self.responses.pop(0)


Ask = Callable[..., list[Any]]


def ask(script: Script, name: str, *args: Any, **given: Any) -> list[Any]:
    """All that a method of the client gives."""
    with Client("http://server", transport=httpx2.MockTransport(script), retry=NO_WAIT) as client:
        return list(getattr(client, name)(*args, **given))


def ask_async(script: Script, name: str, *args: Any, **given: Any) -> list[Any]:
    """The same of the client that awaits."""

    async def talk() -> list[Any]:
        async with AsyncClient("http://server", transport=httpx2.MockTransport(script), retry=NO_WAIT) as client:
            asked = getattr(client, name)(*args, **given)
            if hasattr(asked, "__aiter__"):
                return [event async for event in asked]
            return list(await asked)

    return asyncio.run(talk())


both = pytest.mark.parametrize("asking", [ask, ask_async], ids=["sync", "async"])


@both
def test_a_fanout_sends_its_picture_once_and_answers_in_order(asking: Ask) -> None:
    script = Script(httpx2.Response(200, json={"request_id": "r", "answers": [ANSWER, FAILED]}))
    tasks = ["cap", Item(task="vqa", text="own", decoding={"beam_size": 1})]
    first, second = asking(script, "fanout", b"bytes", tasks, text="top", deadline_ms=50, priority="batch")
    path, body = script.bodies[0]
    assert path == "/v1/fanout"
    assert body == {
        "tasks": [{"task": "cap"}, {"task": "vqa", "text": "own", "decoding": {"beam_size": 1}}],
        "image": base64.b64encode(b"bytes").decode(),
        "text": "top",
        "deadline_ms": 50,
        "priority": "batch",
    }
    assert str(first.output) == "a dog"
    assert second.error.code == "prompt_not_found"


@both
def test_an_item_of_a_fanout_has_no_picture_of_its_own(asking: Ask) -> None:
    for item in (Item(task="cap", image=b"x"), Item(task="cap", id="x")):
        with pytest.raises(ValueError, match="neither a picture nor an id"):
            asking(Script(), "fanout", b"bytes", [item])


@both
def test_a_stream_gives_pieces_then_the_answer(asking: Ask) -> None:
    script = Script(stream(WHOLE))
    *deltas, answer = asking(script, "stream", task="cap", text="q", beam_size=1)
    assert script.bodies[0] == (
        "/v1/predict",
        {"items": [{"task": "cap", "text": "q", "decoding": {"beam_size": 1}}], "stream": True},
    )
    assert "".join(map(str, deltas)) == "a dog"
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert isinstance(answer, Answer)
    assert str(answer.output) == "a dog"


@both
def test_a_failed_item_is_an_answer_of_a_stream_of_many_and_raised_by_a_stream_of_one(asking: Ask) -> None:
    text = event("answer", FAILED) + DONE
    assert asking(Script(stream(text)), "stream_many", [Item(task="vqa")])[0].error.code == "prompt_not_found"
    with pytest.raises(NotFound):
        asking(Script(stream(text)), "stream", task="vqa")


@both
def test_a_refusal_is_an_error_and_one_that_may_pass_is_tried_again(asking: Ask) -> None:
    full = httpx2.Response(429, json={"error": {"code": "tenant_queue_full", "message": "Full."}})
    with pytest.raises(RateLimited, match="Full"):
        asking(Script(full, full, full), "stream", task="cap")
    assert len(asking(Script(full, stream(WHOLE)), "stream", task="cap")) == 3


@both
@pytest.mark.parametrize("text", ["", DELTAS, DELTAS + event("answer", ANSWER)], ids=["empty", "pieces", "no end"])
def test_a_stream_without_its_end_is_an_error(asking: Ask, text: str) -> None:
    with pytest.raises(ConnectionFailed, match="before it was complete"):
        asking(Script(stream(text)), "stream_many", [Item(task="cap")])


@both
@pytest.mark.parametrize(
    "text", ["event: delta\ndata: {\n\n", "event: answer\ndata: 3\n\n"], ids=["no JSON", "no answer"]
)
def test_an_event_that_is_not_understood_is_an_error(asking: Ask, text: str) -> None:
    with pytest.raises(ServerError, match="not understood"):
        asking(Script(stream(text)), "stream_many", [Item(task="cap")])


@contextmanager
def server(*, silent: bool) -> Iterator[str]:
    """Answers one request with the beginning of a stream, then says nothing, or closes."""
    listener, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            piece = DELTAS.encode()
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            connection.sendall(head + b"%x\r\n%s\r\n" % (len(piece), piece))
            if silent:
                over.wait(20)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    over.set()
    thread.join(20)
    listener.close()


@pytest.mark.parametrize(("silent", "kind"), [(False, ConnectionFailed), (True, RequestTimeout)])
def test_a_connection_that_breaks_off_or_falls_silent_is_an_error_after_its_pieces(
    silent: bool, kind: type[Exception]
) -> None:
    heard: list[Any] = []
    with server(silent=silent) as address, Client(address, timeout_s=0.5, retry=NO_WAIT) as client:
        events = client.stream(task="cap")
        heard += [next(events), next(events)]
        with pytest.raises(kind):
            next(events)
    assert "".join(map(str, heard)) == "a dog"
