"""What the HTTP API promises, against an engine that only pretends."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from prometheus_client import generate_latest

from api.fake_engine import SHA, FakeEngine
from api.live_server import live_server
from promptmux_server import errors as error_tree
from promptmux_server.api.app import Application, build_app
from promptmux_server.api.errors import as_promptmux_error, error_response
from promptmux_server.api.keys import KeyFileError, Keys
from promptmux_server.errors import PromptmuxError
from promptmux_server.settings import Settings, unknown_variables

BODY_LIMIT = 64 * 1024


def build(engine: FakeEngine, keys: Keys | None = None, **settings: Any) -> Application:
    return build_app(engine, Settings(max_body_bytes=BODY_LIMIT, **settings), "fake", keys)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def application(engine: FakeEngine) -> Application:
    return build(engine)


@pytest.fixture
def client(application: Application) -> Iterator[httpx2.Client]:
    with live_server(application.asgi) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}") as connected:
        yield connected


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def assert_problem(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body: dict[str, Any] = response.json()
    assert body["error"]["code"] == code
    assert body["status"] == status
    assert body["error"]["request_id"] == response.headers["x-request-id"]
    return body


def test_one_item_may_be_sent_bare(client: httpx2.Client) -> None:
    body = client.post("/v1/predict", json={"task": "echo", "text": "hello"}).json()
    assert body["answers"] == [
        {
            "id": "0",
            "task": "echo",
            "output": {"text": "hello", "kind": "answer"},
            "score": -0.5,
            "prompt": {"name": "echo", "version": 1, "sha256": SHA},
            "timings_ms": {"total": 1.0},
        }
    ]


def test_answers_keep_the_order_of_items_and_failures_stand_beside_successes(client: httpx2.Client) -> None:
    items = [{"task": t, "id": t, "text": t} for t in ("echo", "nobody", "late", "nan", "echo")]
    response = client.post("/v1/predict", json={"items": items})
    answers = response.json()["answers"]
    assert response.status_code == 200
    assert [answer["id"] for answer in answers] == [item["id"] for item in items]
    codes = [answer.get("error", {}).get("code") for answer in answers]
    assert codes == [None, "prompt_not_found", "deadline_exceeded", "nonfinite_output", None]


def test_when_all_items_fail_the_first_error_is_the_answer(client: httpx2.Client) -> None:
    items = [{"task": "late"}, {"task": "nobody"}]
    assert_problem(client.post("/v1/predict", json={"items": items}), 504, "deadline_exceeded")


def test_a_picture_reaches_the_engine_decoded(client: httpx2.Client, engine: FakeEngine) -> None:
    client.post("/v1/predict", json={"task": "echo", "image": picture()})
    image = engine.requests[0].image
    assert image is not None
    assert (image.width, image.height, image.rgb[0, 0].tolist()) == (9, 7, [255, 0, 0])


def test_a_bug_is_opaque(client: httpx2.Client) -> None:
    body = assert_problem(client.post("/v1/predict", json={"task": "broken"}), 500, "internal")
    assert "secret" not in json.dumps(body)
    assert client.get("/livez").status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "items.0.task"),
        ({"items": []}, "items"),
        ({"items": [{"task": 3}]}, "items.0.task"),
        ({"items": [{"task": "echo", "surprise": 1}]}, "items.0"),
        ({"items": [{"task": "echo"}] * 65}, "items"),
        ({"task": "echo", "text": "x" * 4097}, "items.0.text"),
        ({"task": "echo", "deadline_ms": 60_001}, "deadline_ms"),
        ({"task": "echo", "deadline_ms": 0}, "deadline_ms"),
        ({"task": "echo", "decoding": {"beam_size": 99}}, "decoding.beam_size"),
    ],
)
def test_invalid_parameters_are_named(client: httpx2.Client, body: dict[str, Any], param: str) -> None:
    problem = assert_problem(client.post("/v1/predict", json=body), 422, "invalid_parameter")
    assert problem["error"]["param"] == param


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1", b'{"task": NaN}', b'{"task": Infinity}', b'{"x": 1e999}', b'{"x": "\\ud800"}', b"\xff\xfe",
     b'{"a": 1, "a": 2}', b"[" * 5000, b'{"x": ' + b"9" * 40 + b"}", b'{"a":' * 33 + b"1" + b"}" * 33],
)  # fmt: skip
def test_ambiguous_json_is_malformed(client: httpx2.Client, body: bytes) -> None:
    response = client.post("/v1/predict", content=body, headers={"content-type": "application/json"})
    assert_problem(response, 400, "malformed_json")


def test_depth_at_the_limit_parses(client: httpx2.Client) -> None:
    body = b'{"a":' * 32 + b"1" + b"}" * 32
    response = client.post("/v1/predict", content=body, headers={"content-type": "application/json"})
    assert_problem(response, 422, "invalid_parameter")


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/octet-stream", ""])
def test_other_content_types_are_refused(client: httpx2.Client, kind: str) -> None:
    response = client.post("/v1/predict", content=b"{}", headers={"content-type": kind})
    assert_problem(response, 415, "unsupported_media_type")


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
def test_the_body_limit_holds_at_the_limit_and_one_over(client: httpx2.Client, chunked: bool) -> None:
    for size, status in ((BODY_LIMIT, 422), (BODY_LIMIT + 1, 413)):
        empty = len(json.dumps({"task": "nobody", "text": ""}))
        body = json.dumps({"task": "nobody", "text": "x" * (size - empty)}).encode()
        assert len(body) == size
        content: Any = (body[i : i + 9000] for i in range(0, size, 9000)) if chunked else body
        response = client.post("/v1/predict", content=content, headers={"content-type": "application/json"})
        assert response.status_code == status


def test_headers_have_a_limit(client: httpx2.Client) -> None:
    assert_problem(client.get("/livez", headers={"x-big": "x" * 20_000}), 431, "header_too_large")


def test_a_compressed_body_is_refused(client: httpx2.Client) -> None:
    response = client.post("/v1/predict", content=b"x", headers={"content-encoding": "gzip"})
    assert_problem(response, 400, "bad_request")


@pytest.mark.parametrize(("method", "path", "status", "code"), [
    ("GET", "/nowhere", 404, "route_not_found"),
    ("GET", "/v1/predict", 405, "method_not_allowed"),
    ("DELETE", "/v1/tasks", 405, "method_not_allowed"),
    ("GET", "/v1/tasks/nobody", 404, "prompt_not_found"),
    ("GET", "/v1/tasks/..%2f..%2fetc", 404, "route_not_found"),
    ("GET", "/metrics", 404, "route_not_found"),
])  # fmt: skip
def test_absent_routes_answer_in_the_one_shape(
    client: httpx2.Client, method: str, path: str, status: int, code: str
) -> None:
    assert_problem(client.request(method, path), status, code)


def test_a_harmless_request_id_is_kept_and_a_harmful_one_replaced(client: httpx2.Client) -> None:
    assert client.get("/livez", headers={"x-request-id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
    for bad in ("a b", "x" * 65, "<script>"):
        assert client.get("/livez", headers={"x-request-id": bad}).headers["x-request-id"] != bad


def test_health_follows_the_engine(client: httpx2.Client, engine: FakeEngine, application: Application) -> None:
    assert [client.get(p).status_code for p in ("/livez", "/readyz", "/health")] == [200, 200, 200]
    application.lifecycle.draining = True
    assert_problem(client.get("/readyz"), 503, "draining")
    assert client.get("/livez").status_code == 200
    engine.healthy = False
    assert_problem(client.get("/livez"), 503, "backend_unhealthy")


def test_tasks_reload_and_version(client: httpx2.Client) -> None:
    assert [task["name"] for task in client.get("/v1/tasks").json()["tasks"]] == ["caption", "echo", "spell"]
    assert client.get("/v1/tasks/echo").json()["sha256"] == SHA
    assert client.post("/v1/tasks:reload").json()["unchanged"] == ["echo"]
    assert client.get("/version").json()["backbone"] == "fake"
    assert {"/v1/predict", "/v1/fanout"} <= set(client.get("/openapi.json").json()["paths"])


def test_items_beyond_the_queue_are_refused_before_their_pictures_are_decoded() -> None:
    engine = FakeEngine()
    with (
        live_server(build(engine, queue_size=3).asgi) as port,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        items = [{"task": "echo", "image": "not a picture"}] * 4
        response = client.post("/v1/predict", json={"items": items})
        assert_problem(response, 503, "overloaded")
        assert 1 <= int(response.headers["retry-after"]) <= 30
        assert client.post("/v1/predict", json={"task": "echo"}).status_code == 200
    assert len(engine.requests) == 1


def test_a_client_that_leaves_cancels_its_items(client: httpx2.Client, engine: FakeEngine) -> None:
    body = json.dumps({"items": [{"task": "slow"}] * 3}).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:  # type: ignore[arg-type]
        head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_for(lambda: len(engine.futures) == 3)
    wait_for(lambda: all(future.cancelled() for future in engine.futures))
    engine.release.set()
    assert client.post("/v1/predict", json={"task": "echo"}).status_code == 200


def test_a_client_that_stays_gets_its_slow_answer(client: httpx2.Client, engine: FakeEngine) -> None:
    """The control of the test above."""
    engine.release.set()
    assert client.post("/v1/predict", json={"task": "slow", "text": "x"}).json()["answers"][0]["output"]["text"] == "x"


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 20 s"
        time.sleep(0.01)


def test_metrics_count_items_and_keep_labels_bounded(client: httpx2.Client, application: Application) -> None:
    client.post("/v1/predict", json={"items": [{"task": "echo"}, {"task": "nobody"}]})
    before = len(generate_latest(application.metrics.registry).splitlines())
    for i in range(50):
        client.get(f"/random/{i}")
        client.post("/v1/predict", json={"task": f"stranger-{i}"})
    text = generate_latest(application.metrics.registry).decode()
    assert 'promptmux_items_total{outcome="ok",task="echo"} 1.0' in text
    assert 'promptmux_items_total{outcome="prompt_not_found",task="other"} 51.0' in text
    assert len(text.splitlines()) <= before + 40
    assert "stranger" not in text
    assert "random" not in text


def test_every_error_class_is_rendered_with_its_own_code_and_status() -> None:
    classes = [c for c in vars(error_tree).values() if isinstance(c, type) and issubclass(c, PromptmuxError)]
    assert len(classes) > 20
    of_its_own: dict[str, tuple[object, ...]] = {
        "BackboneKeysError": ("message",),
        "TrainingDiverged": ("run", 1, "loss"),
        "PeerLost": (),
        "ExtraMissing": ("train", "optuna"),
    }
    for cls in classes:
        own = of_its_own.get(cls.__name__)
        error = cls("message", retry_after_s=7) if own is None else cls(*own)
        response = error_response(error, "id")
        body = json.loads(response.body)
        assert (response.status_code, body["error"]["code"]) == (cls.status, cls.code)
        assert ("retry-after" in response.headers) == (cls.status in (429, 503))
    assert as_promptmux_error(ValueError("/secret")).message.startswith("The server failed")


KEY, ADMIN_KEY = "s3cret", "4dmin"


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    lines = [f"user infer {hashlib.sha256(KEY.encode()).hexdigest()}", "# note", ""]
    lines.append(f"boss infer,admin {hashlib.sha256(ADMIN_KEY.encode()).hexdigest()}")
    (tmp_path / "keys").write_text("\n".join(lines))
    return Keys.read(tmp_path / "keys")


def test_with_keys_every_route_but_two_is_closed(keys: Keys, engine: FakeEngine) -> None:
    application = build(engine, keys)
    open_paths = {"/livez", "/readyz"}
    with live_server(application.asgi) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
        paths = [
            "/v1/predict",
            "/v1/fanout",
            "/v1/tasks",
            "/v1/tasks/echo",
            "/v1/tasks:reload",
            "/health",
            "/version",
            "/openapi.json",
            "/x",
        ]
        for path in [*paths, "//livez", "/livez/", "/LIVEZ", "/livez%2f..", "/v1/tasks?x=/livez"]:
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
                assert client.request(method, path).status_code == 401, (method, path)
                wrong = client.request(method, path, headers={"authorization": "Bearer wrong"})
                assert wrong.status_code == 401
        assert all(client.get(path).status_code == 200 for path in open_paths)
        assert client.get("/v1/tasks", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        reload = client.post("/v1/tasks:reload", headers={"authorization": f"Bearer {KEY}"})
        assert_problem(reload, 403, "forbidden")
        assert client.post("/v1/tasks:reload", headers={"authorization": f"Bearer {ADMIN_KEY}"}).status_code == 200
        twice = [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")]
        assert client.get("/v1/tasks", headers=twice).status_code == 401


def test_without_a_key_no_byte_of_a_body_is_read(keys: Keys, engine: FakeEngine) -> None:
    with live_server(build(engine, keys).asgi) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n")
        assert b"401" in connection.recv(4096)


@pytest.mark.parametrize("text", ["", "user infer", f"u infer {'A' * 64}", f"u root {'a' * 64}"])
def test_a_key_file_that_says_nothing_sensible_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(KeyFileError):
        Keys.read(tmp_path / "keys")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_a_public_address_needs_keys(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refusing to listen"):
        Settings(host=host)
    assert Settings(host=host, api_keys=tmp_path / "keys")


def test_settings_are_frozen_and_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMUX_PORT", "9123")
    assert Settings().port == 9123
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="Extra inputs"):
        Settings(surprise=1)  # type: ignore[call-arg]
    assert unknown_variables(["PROMPTMUX_PORT", "PROMPTMUX_URL", "PROMPTMUX_TYPO", "HOME"]) == ["PROMPTMUX_TYPO"]
