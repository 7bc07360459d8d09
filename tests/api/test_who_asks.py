"""Who asks and how urgently: names of keys, shares of the queue, and refusals that cost nothing."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from api.fake_engine import FakeEngine
from api.live_server import live_server, until
from promptmux_server.api.admission import Admission, Place
from promptmux_server.api.app import Application, build_app
from promptmux_server.api.keys import Keys
from promptmux_server.engine.request import Answer, Request
from promptmux_server.errors import Overloaded, PromptmuxError, TenantQueueFull
from promptmux_server.settings import Settings

SECRETS = {"anna": "s3cret-of-anna", "bert": "s3cret-of-bert"}
ROUTES = {
    "/v1/predict": lambda task, count: {"items": [{"task": task}] * count},
    "/v1/fanout": lambda task, count: {"tasks": [task] * count},
}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def application(engine: FakeEngine, tmp_path: Path) -> Application:
    lines = [f"{name} infer {hashlib.sha256(secret.encode()).hexdigest()}" for name, secret in SECRETS.items()]
    (tmp_path / "keys").write_text("\n".join(lines))
    return build_app(engine, Settings(queue_size=8, queue_per_key=4), "fake", Keys.read(tmp_path / "keys"))


@pytest.fixture
def client(application: Application) -> Iterator[httpx2.Client]:
    with live_server(application.asgi) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}") as connected:
        yield connected


def as_(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRETS[name]}"}


@pytest.mark.parametrize("route", ROUTES)
def test_the_engine_learns_the_keys_name_and_the_priority(
    client: httpx2.Client, engine: FakeEngine, route: str
) -> None:
    body = ROUTES[route]("echo", 1)
    client.post(route, json=body, headers=as_("anna"))
    client.post(route, json=body | {"priority": "batch"}, headers=as_("bert"))
    assert [(r.key, r.priority) for r in engine.requests] == [("anna", "interactive"), ("bert", "batch")]


def test_a_bare_item_may_say_its_priority(client: httpx2.Client, engine: FakeEngine) -> None:
    client.post("/v1/predict", json={"task": "echo", "priority": "batch"}, headers=as_("anna"))
    assert engine.requests[0].priority == "batch"


def test_without_keys_nobody_has_a_name_or_a_share() -> None:
    engine = FakeEngine()
    app = build_app(engine, Settings(queue_size=8, queue_per_key=4), "fake")
    with live_server(app.asgi) as port:
        response = httpx2.post(f"http://127.0.0.1:{port}/v1/fanout", json={"tasks": ["echo"] * 8})
    assert response.status_code == 200
    assert {request.key for request in engine.requests} == {""}


def test_no_key_reaches_the_log_or_the_metrics(client: httpx2.Client, application: Application) -> None:
    with capture_logs() as logs:
        client.post("/v1/predict", json={"task": "echo"}, headers=as_("anna"))
        client.post("/v1/predict", json={"task": "broken"}, headers=as_("anna"))
        until(lambda: sum(entry["event"] == "request" for entry in logs) == 2)
    said = repr(logs) + generate_latest(application.metrics.registry).decode()
    assert "item failed" in said
    assert SECRETS["anna"] not in said
    assert hashlib.sha256(SECRETS["anna"].encode()).hexdigest() not in said


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_key_over_its_share_is_refused_before_decoding_and_others_are_not(
    client: httpx2.Client, engine: FakeEngine, route: str, stream: bool
) -> None:
    """The refused call's pictures are none: had they been looked at, the status would be 400."""
    held = threading.Thread(
        target=lambda: client.post(route, json=ROUTES[route]("slow", 3), headers=as_("anna"), timeout=30)
    )
    held.start()
    until(lambda: len(engine.requests) == 3)
    items: dict[str, Any] = ROUTES[route]("echo", 2) | {"stream": stream}
    if route == "/v1/predict":
        items["items"] = [{"task": "echo", "image": "no picture"}] * 2
    else:
        items["image"] = "no picture"
    response = client.post(route, json=items, headers=as_("anna"))
    assert (response.status_code, response.json()["error"]["code"]) == (429, "tenant_queue_full")
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert client.post(route, json=items, headers=as_("bert")).json()["error"]["code"] == "malformed_image"
    one_more = client.post(route, json=ROUTES[route]("echo", 1), headers=as_("anna"))
    assert one_more.status_code == 200
    engine.release.set()
    held.join(20)
    again = client.post(route, json=ROUTES[route]("echo", 4), headers=as_("anna"))
    assert again.status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "waits"),
    [
        (TenantQueueFull("Your share is full.", retry_after_s=7), 429, {"7"}),
        (Overloaded("All is full.", retry_after_s=99), 503, {"30"}),
        (Overloaded("All is full."), 503, {"1", "2", "3", "4"}),
    ],
    ids=["share", "far too long", "no estimate"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
def test_what_the_engine_refuses_reaches_the_client_with_its_wait(
    client: httpx2.Client,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    stream: bool,
    error: PromptmuxError,
    status: int,
    waits: set[str],
) -> None:
    def submit(request: Request) -> Future[Answer]:
        raise error

    monkeypatch.setattr(engine, "submit", submit)
    response = client.post(route, json=ROUTES[route]("echo", 2) | {"stream": stream}, headers=as_("anna"))
    assert (response.status_code, response.json()["error"]["code"]) == (status, error.code)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["retry-after"] in waits


@given(st.lists(st.tuples(st.sampled_from(["", "anna", "bert"]), st.integers(1, 5), st.integers(0, 9))))
def test_counts_are_exact_whoever_comes_and_goes(calls: list[tuple[str, int, int]]) -> None:
    """Against a plain list of who is inside."""
    admission = Admission(total=8, per_key=4)
    inside: list[tuple[str, int, Place]] = []
    for key, count, leaving in calls:
        own = sum(n for name, n, _ in inside if name == key)
        everyone = sum(n for _, n, _ in inside)
        wanted = TenantQueueFull if key and own + count > 4 else Overloaded if everyone + count > 8 else None
        if wanted is None:
            inside.append((key, count, admission.enter(key, count)))
        else:
            with pytest.raises(wanted):
                admission.enter(key, count)
        if leaving < len(inside):
            _, _, place = inside.pop(leaving)
            place.leave()
            place.leave()
