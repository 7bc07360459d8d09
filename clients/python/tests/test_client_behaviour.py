"""The client against scripted transports, and once against a real socket."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

import promptmux
from promptmux import APIStatusError, AsyncClient, Client, ConnectionFailed, Item, PromptmuxError, RequestTimeout
from promptmux._errors import BY_CODE, BY_STATUS, SPECIAL, class_for
from promptmux._retry import RetryPolicy

from .scripted import NO_WAIT, Script

ANSWER = {
    "id": "0",
    "task": "vqa",
    "output": {"kind": "answer", "text": "two"},
    "score": -0.1,
    "prompt": {"name": "vqa", "version": 3, "sha256": "ab"},
    "timings_ms": {"total": 1.5},
    "a_field_of_a_newer_server": 1,
}


def ok(*answers: dict[str, Any]) -> httpx2.Response:
    return httpx2.Response(200, json={"request_id": "r", "answers": list(answers) or [ANSWER]})


def refusal(status: int, code: str = "some_code", **headers: str) -> httpx2.Response:
    error = {"code": code, "message": "No.", "param": "text", "request_id": "r9", "retryable": False}
    return httpx2.Response(status, json={"status": status, "error": error}, headers=headers)


def test_an_answer_is_typed() -> None:
    answer = Script(ok()).client().predict(task="vqa", text="how many?")
    assert isinstance(answer.output, promptmux.AnswerOutput)
    assert (answer.output.text, str(answer.output)) == ("two", "two")
    assert answer.prompt is not None
    assert answer.prompt.version == 3


def test_what_is_sent_is_what_was_given_and_nothing_else() -> None:
    script = Script(ok())
    script.client(api_key="k").predict(task="vqa", image=b"bytes", text="q", beam_size=3, deadline_ms=50)
    request = script.requests[0]
    assert json.loads(request.content) == {
        "items": [
            {"task": "vqa", "image": base64.b64encode(b"bytes").decode(), "text": "q", "decoding": {"beam_size": 3}}
        ],
        "deadline_ms": 50,
    }
    assert request.headers["authorization"] == "Bearer k"


@pytest.mark.parametrize(
    ("output", "kind", "shown"),
    [
        ({"kind": "caption", "text": "a dog"}, promptmux.CaptionOutput, "a dog"),
        (
            {"kind": "label", "label": "yes", "probabilities": {"yes": 0.75, "no": 0.25}},
            promptmux.LabelOutput,
            "yes (75%)",
        ),
        ({"kind": "box", "box": [1.0, 2.2, 3.0, 4.6]}, promptmux.BoxOutput, "[1, 2, 3, 5]"),
        ({"kind": "text", "text": "x"}, promptmux.TextOutput, "x"),
        ({"kind": "song", "notes": [1]}, promptmux.OtherOutput, None),
    ],
)
def test_every_kind_of_output_is_understood(output: dict[str, Any], kind: type, shown: str | None) -> None:
    answer = Script(ok({**ANSWER, "output": output})).client().predict(task="t")
    assert isinstance(answer.output, kind)
    assert shown is None or str(answer.output) == shown


def test_a_path_bytes_and_a_pil_image_are_the_same_picture(tmp_path: Path) -> None:
    picture = Image.new("RGB", (3, 2), "red")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    (tmp_path / "p.png").write_bytes(buffer.getvalue())
    script = Script(ok(ANSWER, ANSWER, ANSWER, ANSWER))
    sources = [tmp_path / "p.png", str(tmp_path / "p.png"), buffer.getvalue(), picture]
    script.client().predict_many([Item(task="t", image=source) for source in sources])
    sent = [item["image"] for item in json.loads(script.requests[0].content)["items"]]
    assert len(set(sent)) == 1


def test_a_failed_item_stands_beside_the_others_and_predict_raises_it() -> None:
    failed = {"id": "1", "task": "x", "error": {"code": "prompt_not_found", "message": "No such task."}}
    answers = Script(ok(ANSWER, failed)).client().predict_many([Item(task="vqa"), Item(task="x")])
    assert answers[0].error is None
    assert answers[1].error is not None
    assert answers[1].output is None
    with pytest.raises(promptmux.NotFound, match="No such task"):
        Script(ok(failed)).client().predict(task="x")


@pytest.mark.parametrize(("status", "kind"), [*BY_STATUS.items(), (500, promptmux.ServerError), (418, APIStatusError)])
def test_every_status_has_its_class(status: int, kind: type[APIStatusError]) -> None:
    script = Script(*[refusal(status)] * 3)
    with pytest.raises(kind) as caught:
        script.client().tasks()
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.param, error.request_id) == (status, "some_code", "text", "r9")


def test_every_class_of_the_tree_is_reachable() -> None:
    tables = (BY_STATUS, BY_CODE, SPECIAL)
    reachable = {kind for table in tables for kind in table.values()} | {class_for(418), class_for(599)}
    classes = {c for c in vars(promptmux).values() if isinstance(c, type) and issubclass(c, APIStatusError)}
    assert classes == reachable


def test_a_proxys_page_gives_its_status() -> None:
    with pytest.raises(promptmux.NotFound, match="404"):
        Script(httpx2.Response(404, text="<html>nginx</html>")).client().tasks()


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"answers": 3}', '{"answers": [{}]}'])
def test_an_answer_that_is_not_understood_is_an_error(body: str) -> None:
    with pytest.raises(promptmux.ServerError, match=r"not understood|not JSON"):
        Script(httpx2.Response(200, text=body)).client().predict(task="t")


@pytest.mark.parametrize(
    "failure",
    [refusal(429), refusal(503), refusal(502), httpx2.ConnectError("no")],
    ids=["429", "503", "502", "refused"],
)
def test_what_may_pass_is_tried_again(failure: Any) -> None:
    script = Script(failure, failure, ok())
    assert script.client().predict(task="vqa").output is not None
    assert len(script.requests) == 3


def test_retries_end() -> None:
    with pytest.raises(promptmux.Overloaded):
        Script(*[refusal(503)] * 3).client().tasks()
    with pytest.raises(ConnectionFailed, match="http://server"):
        Script(*[httpx2.ConnectError("no")] * 3).client().tasks()


@pytest.mark.parametrize("failure", [refusal(400), refusal(422), refusal(500), refusal(504)])
def test_what_will_not_pass_is_not_repeated(failure: httpx2.Response) -> None:
    script = Script(failure)
    with pytest.raises(APIStatusError):
        script.client().tasks()
    assert len(script.requests) == 1


def test_a_timeout_is_its_own_error_and_not_repeated() -> None:
    script = Script(httpx2.ReadTimeout("slow"))
    with pytest.raises(RequestTimeout):
        script.client().tasks()
    assert len(script.requests) == 1


def delay(status: int = 503, attempt: int = 0, **headers: str) -> float | None:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return RetryPolicy().delay_s(attempt, httpx2.Response(status, headers=named))


def test_what_must_not_be_done_twice_is_repeated_only_if_nothing_was_done() -> None:
    policy = RetryPolicy()
    answers = {status: policy.delay_s(0, httpx2.Response(status), repeatable=False) for status in (429, 502, 503)}
    assert answers[429] is not None
    assert answers[502] is answers[503] is None


def test_the_servers_wish_wins_over_the_backoff() -> None:
    assert delay(retry_after="3") == 3.0
    assert delay(retry_after="3", retry_after_ms="250") == 0.25
    assert delay(retry_after="900") == 60.0
    assert delay(x_should_retry="false") is None
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=5), usegmt=True)
    until = delay(retry_after=at)
    assert until is not None
    assert 3.0 < until <= 5.0
    nonsense = delay(retry_after="soon")
    assert nonsense is not None
    assert nonsense <= 0.25


def test_the_backoff_doubles_up_to_its_cap_with_jitter() -> None:
    policy = RetryPolicy(max_retries=9, first_delay_s=1.0, max_delay_s=4.0)
    for attempt, most in enumerate((1.0, 2.0, 4.0, 4.0)):
        delays = {policy.delay_s(attempt, None) for _ in range(200)}
        assert all(value is not None and 0.0 <= value <= most for value in delays)
        assert max(value or 0.0 for value in delays) > 0.8 * most
        assert len(delays) > 100
    assert policy.delay_s(9, None) is None


def test_address_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMUX_URL", "http://elsewhere:9")
    monkeypatch.setenv("PROMPTMUX_API_KEY", "k2")
    script = Script(httpx2.Response(200, json={"tasks": []}))
    Client(transport=httpx2.MockTransport(script)).tasks()
    assert str(script.requests[0].url) == "http://elsewhere:9/v1/tasks"
    assert script.requests[0].headers["authorization"] == "Bearer k2"


def test_the_public_names_are_these() -> None:
    public = {name for name in vars(promptmux) if not name.startswith("_")}
    assert public == set(promptmux.__all__)
    assert promptmux.__all__ == sorted(promptmux.__all__)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply({"request_id": "r", "answers": [ANSWER]})

    def do_GET(self) -> None:
        self._reply({"tasks": [{"name": "vqa", "state": "ready"}], "version": "0.1.0"})

    def _reply(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_over_a_real_socket(address: str) -> None:
    with Client(address) as client:
        assert client.ready()
        assert client.tasks()[0].name == "vqa"
        assert client.version()["version"] == "0.1.0"
        assert str(client.predict(task="vqa").output) == "two"


def test_the_async_client_does_the_same(address: str) -> None:
    async def talk() -> None:
        async with AsyncClient(address) as client:
            assert await client.ready()
            assert (await client.tasks())[0].name == "vqa"
            assert (await client.version())["version"] == "0.1.0"
            answers = await asyncio.gather(*(client.predict(task="vqa") for _ in range(5)))
            assert [str(answer.output) for answer in answers] == ["two"] * 5

    asyncio.run(talk())


def test_nobody_at_the_address() -> None:
    async def talk() -> None:
        async with AsyncClient("http://127.0.0.1:9", retry=NO_WAIT) as client:
            assert not await client.ready()
            with pytest.raises(ConnectionFailed):
                await client.tasks()

    asyncio.run(talk())
    with Client("http://127.0.0.1:9", retry=NO_WAIT) as client:
        assert not client.ready()
        with pytest.raises(PromptmuxError):
            client.tasks()
