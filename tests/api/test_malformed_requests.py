"""2,000 generated requests to every route: whatever is sent, the reply is strict JSON in the documented shape."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import httpx2
import pytest
from starlette.responses import PlainTextResponse

from api.fake_engine import FakeEngine
from api.live_server import live_server
from promptmux_server.api.app import build_app
from promptmux_server.settings import Settings

SEED = 20261124
COUNT = 2000
SECRET = "pl4nted"
ROUTES = (
    "/v1/predict",
    "/v1/fanout",
    "/v1/tasks",
    "/v1/tasks/echo",
    "/v1/tasks:reload",
    "/v1/trainings",
    "/v1/trainings/x",
    "/v1/trainings/x/events",
    "/livez",
    "/readyz",
    "/health",
    "/version",
    "/x",
)
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
LEAKS = re.compile(r"Traceback|/home/|/usr/|site-packages|0x[0-9a-f]{6,}|torch\.|\.py\b")


def value(rng: random.Random, depth: int = 0) -> Any:
    choice = rng.randrange(12 if depth < 4 else 8)
    scalars: list[Any] = [
        None,
        True,
        rng.randint(-9, 1 << 70),
        rng.random() * 1e300,
        SECRET,
        "é\u0000\u202e",
        "",
        "A" * 500,
    ]
    if choice < 8:
        return scalars[choice]
    if choice < 10:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice(["items", "task", "tasks", "image", "text", "stream", SECRET]): value(rng, depth + 1)
        for _ in range(rng.randrange(4))
    }


def request_body(rng: random.Random) -> bytes:
    item = {
        "task": rng.choice(["echo", "late", "nan", SECRET, 3, None]),
        "text": value(rng),
        "image": value(rng),
        "decoding": value(rng),
    }
    item = {k: v for k, v in item.items() if rng.random() < 0.6}
    fanout = {"tasks": [rng.choice([item, "echo", value(rng)]) for _ in range(rng.randrange(4))], "text": value(rng)}
    options = {"deadline_ms": value(rng), "priority": value(rng), "stream": value(rng)}
    options = {k: v for k, v in options.items() if rng.random() < 0.1}
    body: Any = rng.choice(
        [item | options, {"items": [item] * rng.randrange(4)}, {"items": value(rng)} | options, fanout | options,
         {"tasks": value(rng)}, value(rng)]
    )  # fmt: skip
    data = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice((0, 0, 1, 3))):
        place = rng.randrange(len(data) + 1)
        data[place:place] = rng.choice(
            [b"NaN", b"1e999", b"\xff", b"\\ud800", b"{", b"]", b'"', b"[" * 40, b'"a":1,"a":1,']
        )
    return bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data) + 1)))])


def send(client: httpx2.Client, rng: random.Random) -> httpx2.Response:
    path = rng.choice(
        [
            *ROUTES,
            "/v1/predict",
            "/v1/predict",
            "/v1/fanout",
            "/v1/fanout",
            f"/{rng.randrange(99)}/%00%2e%2e",
            f"/v1/tasks/{SECRET}%0d%0a",
        ]
    )
    kind = rng.choice(["application/json", "application/json; charset=utf-8", "application/json", "text/xml", ""])
    headers = {"content-type": kind} | rng.choice(
        [{}, {"x-request-id": f"<{SECRET}>"}, {"authorization": "Bearer"}, {"accept": "x"}]
    )
    body = request_body(rng)
    content: Any = body if rng.random() < 0.8 else (body[i : i + 7] for i in range(0, len(body), 7))
    return client.request(
        rng.choice(METHODS if path not in ("/v1/predict", "/v1/fanout") else ("POST",)),
        path,
        content=content,
        headers=headers,
    )


def complaint(response: httpx2.Response) -> str | None:
    """What is wrong with a reply, or None."""
    text = response.text
    if response.status_code >= 500 and response.status_code not in (503, 504):
        return f"status {response.status_code}"
    if response.status_code == 200 and response.headers.get("content-type", "").startswith("text/event-stream"):
        return None if text.endswith("\n\n") and "event: done\n" in text else "half a stream"
    if response.headers.get("content-type") != "application/json":
        return "not JSON"
    body = json.loads(text, parse_constant=lambda _: pytest.fail("not strict"))
    if response.status_code != 200:
        wanted = {"code", "message", "type", "param", "request_id", "retryable"}
        if set(body.get("error", ())) != wanted or len(text) > 4096 or body["status"] != response.status_code:
            return "another shape"
        if SECRET in text:
            return "an echo"
    return "a leak" if LEAKS.search(text) else None


def complaints(asgi: Any, count: int) -> list[str]:
    rng = random.Random(SEED)
    found = []
    with live_server(asgi) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for number in range(count):
            found.append(complaint(send(client, rng)))
            if number % 50 == 0:  # the same connection still answers a good request
                good = client.post("/v1/predict", json={"task": "echo", "text": "ok"})
                found.append(None if good.status_code == 200 else "a good request failed")
    return [entry for entry in found if entry]


def test_no_malformed_request_gets_anything_but_a_documented_error() -> None:
    # 503 and 504 are the scripted engine's answers to the tasks "nan" and "late".
    assert complaints(build_app(FakeEngine(), Settings(), "fake").asgi, COUNT) == []


def test_the_checker_sees_a_server_that_answers_otherwise() -> None:
    """The control: an application whose errors are plain text is caught."""
    application = build_app(FakeEngine(), Settings(), "fake").asgi

    async def careless(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "PUT":
            await PlainTextResponse("oops", 500)(scope, receive, send)
        else:
            await application(scope, receive, send)

    assert complaints(careless, 200) != []
