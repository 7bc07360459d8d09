"""What must hold at the edges: clients that leave, deadlines, bytes that are no HTTP, and what is documented."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx2
import pytest

import promptmux_prompts.errors as prompt_errors
from api.fake_engine import FakeEngine
from api.live_server import live_server, until
from promptmux_server.api import documents
from promptmux_server.api.app import build_app
from promptmux_server.api.errors import as_promptmux_error, error_response
from promptmux_server.api.keys import Keys
from promptmux_server.api.schemas import Decoding
from promptmux_server.engine.request import Answer, Request
from promptmux_server.errors import Overloaded
from promptmux_server.settings import Settings
from promptmux_server.tasks import AnswerOutput, BoxOutput, CaptionOutput, LabelOutput, TextOutput
from promptmux_server.tasks.decoding import DecodingParams
from promptmux_server.tasks.outputs import Output

TOKEN_SHA = "2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90"  # of "alice"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[httpx2.Client]:
    app = build_app(engine, Settings(), "fake")
    with live_server(app.asgi) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}") as connected:
        yield connected


def raw(port: int, data: bytes) -> bytes:
    """Everything the server says to these bytes until it closes or falls silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(data)
        connection.settimeout(2)
        heard = b""
        try:
            while part := connection.recv(65536):
                heard += part
        except TimeoutError:
            pass
        return heard


def port_of(client: httpx2.Client) -> int:
    assert client.base_url.port is not None
    return client.base_url.port


def code(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


# -- clients and deadlines ------------------------------------------------------------------------------------------


def test_a_deadline_is_kept_even_if_the_engine_does_not_keep_it(client: httpx2.Client, engine: FakeEngine) -> None:
    started = time.monotonic()
    response = client.post("/v1/predict", json={"task": "slow", "deadline_ms": 150})
    assert code(response) == (504, "deadline_exceeded")
    assert 0.15 <= time.monotonic() - started < 2.0
    assert engine.futures[0].cancelled()


def test_only_the_late_item_of_a_call_fails(client: httpx2.Client) -> None:
    items = [{"task": "slow"}, {"task": "echo", "text": "x"}]
    answers = client.post("/v1/predict", json={"items": items, "deadline_ms": 150}).json()["answers"]
    assert answers[0]["error"]["code"] == "deadline_exceeded"
    assert answers[1]["output"]["text"] == "x"


@pytest.mark.parametrize(("deadline_ms", "status"), [(60_000, 200), (60_001, 422), (0, 422)])
def test_a_deadline_has_bounds(client: httpx2.Client, deadline_ms: int, status: int) -> None:
    assert client.post("/v1/predict", json={"task": "echo", "deadline_ms": deadline_ms}).status_code == status


def test_a_client_that_leaves_while_its_item_is_submitted_leaves_no_work_behind(
    client: httpx2.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, entered = engine.submit, threading.Event()

    def submit_slowly(request: Request) -> Future[Answer]:
        entered.set()
        time.sleep(0.3)
        return submit(request)

    monkeypatch.setattr(engine, "submit", submit_slowly)
    body = b'{"task": "slow"}'
    with socket.create_connection(("127.0.0.1", port_of(client))) as connection:
        connection.sendall(post(body))
        assert entered.wait(5)
    until(lambda: bool(engine.futures) and engine.futures[0].cancelled())


def test_a_number_that_is_not_finite_fails_its_item_alone(client: httpx2.Client, engine: FakeEngine) -> None:
    def answer(request: Request) -> Answer:
        score = float("nan") if request.text == "bad" else -1.0
        return dataclasses.replace(FakeEngine.answer(engine, request), score=score)

    engine.answer = answer  # type: ignore[method-assign]
    items = [{"task": "echo", "text": "bad"}, {"task": "echo", "text": "good"}]
    answers = client.post("/v1/predict", json={"items": items}).json()["answers"]
    assert answers[0]["error"]["code"] == "nonfinite_output"
    assert answers[1]["score"] == -1.0


# -- below and beside the routes ------------------------------------------------------------------------------------


def post(body: bytes, *headers: str, length: int | None = None) -> bytes:
    head = ["POST /v1/predict HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head += [f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(head).encode() + body


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        post(b"{}", length=-1),
        post(b"{}", "Content-Length: 5"),
        post(b"{}", "Transfer-Encoding: chunked"),
        b"GET /livez HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
    ids=["not a request", "negative length", "two lengths", "length and chunks", "a space in a name", "TLS"],
)
def test_bytes_that_are_no_request_get_the_one_error_shape(client: httpx2.Client, data: bytes) -> None:
    head, _, body = raw(port_of(client), data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head
    documents.ErrorBody.model_validate_json(body)


def test_an_upgrade_to_websocket_is_a_plain_request_and_needs_a_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"alice infer {TOKEN_SHA}\n")
    app = build_app(FakeEngine(), Settings(), "fake", Keys.read(tmp_path / "keys"))
    upgrade = b"GET /v1/tasks HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    upgrade += b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    with live_server(app.asgi) as port:
        assert raw(port, upgrade + b"\r\n").startswith(b"HTTP/1.1 401 ")
        assert raw(port, upgrade + b"Authorization: Bearer alice\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "content-length"])
def test_a_large_body_without_a_key_is_not_waited_for(tmp_path: Path, chunked: bool) -> None:
    (tmp_path / "keys").write_text(f"alice infer {TOKEN_SHA}\n")
    app = build_app(FakeEngine(), Settings(), "fake", Keys.read(tmp_path / "keys"))
    mebibyte, sent = b"x" * (1 << 20), 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(200):
            sent += 1
            yield mebibyte

    headers = {"content-type": "application/json"} | ({} if chunked else {"content-length": str(200 << 20)})
    with live_server(app.asgi) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
        response = client.post("/v1/predict", content=body(), headers=headers)
    assert code(response) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["connection"] == "close"
    assert sent < 50


def test_a_small_refused_body_keeps_its_connection(client: httpx2.Client) -> None:
    """The control of the test above: closing is for long bodies only."""
    response = client.post("/v1/predict", content=b"x" * 1000, headers={"content-type": "text/plain"})
    assert code(response) == (415, "unsupported_media_type")
    assert "connection" not in response.headers


def test_a_wrong_method_is_told_the_right_ones(client: httpx2.Client) -> None:
    assert client.put("/v1/predict").headers["allow"] == "POST"


def test_unknown_decoding_parameters_are_not_repeated(client: httpx2.Client) -> None:
    response = client.post("/v1/predict", json={"task": "echo", "decoding": {"pl4nted": 1}})
    assert code(response) == (422, "invalid_parameter")
    assert "pl4nted" not in response.text
    assert list(Decoding.model_fields) == [field.name for field in dataclasses.fields(DecodingParams)]


def test_callers_turned_away_together_are_spread_and_never_told_to_wait_long() -> None:
    waits = {int(error_response(Overloaded("Full."), "id").headers["retry-after"]) for _ in range(200)}
    assert len(waits) > 1
    assert waits <= set(range(1, 31))
    assert error_response(Overloaded("Full.", retry_after_s=999), "id").headers["retry-after"] == "30"


STORE_STATUSES = {
    "invalid_parameter": 422,
    "prompt_not_found": 404,
    "version_not_found": 404,
    "registry_full": 409,
    "version_mismatch": 412,
    "storage_failed": 503,
    "prompt_quarantined": 503,
    "storage_full": 507,
}


def test_every_refusal_of_a_prompt_file_and_of_the_store_keeps_its_code() -> None:
    refusals = [c for c in vars(prompt_errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    refusals.remove(prompt_errors.ImportRefused)  # of a command that reads other programs' files
    assert len(refusals) > 12
    for refusal in refusals:
        known = as_promptmux_error(refusal("It is refused."))
        status = 422 if issubclass(refusal, prompt_errors.PromptFileError) else STORE_STATUSES[refusal.code]
        assert (known.status, known.code) == (status, refusal.code)


# -- documentation --------------------------------------------------------------------------------------------------


def test_every_reference_of_the_document_resolves_and_every_route_documents_its_errors(client: httpx2.Client) -> None:
    text = client.get("/openapi.json").text
    document = json.loads(text)
    schemas = document["components"]["schemas"]
    references = [part.split('"')[0] for part in text.split('"$ref":"')[1:]]
    assert references
    assert all(reference.removeprefix("#/components/schemas/") in schemas for reference in references)
    for path in document["paths"].values():
        for operation in path.values():
            assert {"4XX", "5XX"} < set(operation["responses"]) <= {"200", "201", "204", "4XX", "5XX"}


@pytest.mark.parametrize(
    "output",
    [
        CaptionOutput("a dog"),
        AnswerOutput("two"),
        TextOutput("x"),
        LabelOutput("yes", {"yes": 0.75, "no": 0.25}),
        BoxOutput((0.0, 1.0, 2.5, 3.0)),
    ],
    ids=lambda output: str(output.kind),
)
def test_answers_are_what_the_document_says(client: httpx2.Client, engine: FakeEngine, output: Output) -> None:
    engine.answer = lambda request: dataclasses.replace(FakeEngine.answer(engine, request), output=output)  # type: ignore[method-assign]
    body = client.post("/v1/predict", json={"items": [{"task": "echo"}, {"task": "none"}]}).text
    assert {"kind": output.kind} | json.loads(json.dumps(dataclasses.asdict(output))) == json.loads(body)["answers"][0][
        "output"
    ]
    documents.PredictAnswer.model_validate_json(body)


@pytest.mark.parametrize(
    ("method", "path", "model"),
    [
        ("GET", "/v1/tasks", documents.TaskList),
        ("GET", "/v1/tasks/echo", documents.Task),
        ("POST", "/v1/tasks:reload", documents.Reload),
        ("GET", "/livez", documents.Status),
        ("GET", "/readyz", documents.Status),
        ("GET", "/health", documents.Status),
        ("GET", "/version", documents.Version),
        ("GET", "/nowhere", documents.ErrorBody),
    ],
)
def test_other_replies_are_what_the_document_says(client: httpx2.Client, method: str, path: str, model: Any) -> None:
    model.model_validate_json(client.request(method, path).text)
