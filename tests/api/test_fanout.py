"""POST /v1/fanout: one picture and text for many tasks, decoded once, in the form that predict answers in."""

from __future__ import annotations

import base64
import gc
import io
import json
import socket
import weakref
from collections.abc import Iterator
from typing import Any

import anyio
import httpx2
import pytest
from PIL import Image

from api.fake_engine import FakeEngine
from api.live_server import live_server, until
from promptmux_server.api import documents, pictures
from promptmux_server.api.app import build_app
from promptmux_server.backbone.images import ImageLimits
from promptmux_server.settings import Settings


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[httpx2.Client]:
    app = build_app(engine, Settings(queue_size=70), "fake")
    with live_server(app.asgi) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}") as connected:
        yield connected


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pictures that were decoded, as they were sent."""
    seen: list[str] = []
    decode = pictures.decode_base64_image

    def counted(text: str, limits: Any) -> Any:
        seen.append(text)
        return decode(text, limits)

    monkeypatch.setattr(pictures, "decode_base64_image", counted)
    return seen


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def problem(response: httpx2.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_answers_stand_in_the_order_of_the_tasks_and_the_document_describes_them(client: httpx2.Client) -> None:
    body = {"tasks": ["echo", "caption", "nobody", "echo"], "image": picture(), "text": "a dog"}
    response = client.post("/v1/fanout", json=body)
    assert response.status_code == 200
    documents.PredictAnswer.model_validate_json(response.text)
    answers = response.json()["answers"]
    assert [answer["task"] for answer in answers] == body["tasks"]
    assert len({answer["id"] for answer in answers}) == 4
    assert answers[2]["error"]["code"] == "prompt_not_found"


def test_all_tasks_share_one_picture_that_was_decoded_once(
    client: httpx2.Client, engine: FakeEngine, decodings: list[str]
) -> None:
    client.post("/v1/fanout", json={"tasks": ["echo", "caption"] * 10, "image": picture()})
    images = [request.image for request in engine.requests]
    assert len(images) == 20
    assert images[0] is not None
    assert all(image is images[0] for image in images)
    assert len(decodings) == 1


def test_items_of_predict_have_a_picture_each(client: httpx2.Client, decodings: list[str]) -> None:
    """The control of the test above: the counter counts."""
    client.post("/v1/predict", json={"items": [{"task": "echo", "image": picture()}] * 3})
    assert len(decodings) == 3


def test_what_stands_at_the_top_goes_to_those_that_take_it_and_an_items_own_wins(
    client: httpx2.Client, engine: FakeEngine
) -> None:
    tasks = ["echo", {"task": "echo", "text": "own"}, "caption", "spell"]
    response = client.post("/v1/fanout", json={"tasks": tasks, "image": picture(), "text": "top"})
    assert [answer["output"]["text"] for answer in response.json()["answers"]] == ["top", "own", "", "top"]
    with_image = {request.task: request.image is not None for request in engine.requests}
    assert with_image == {"echo": True, "caption": True, "spell": False}


def test_a_text_of_its_own_that_a_task_does_not_take_is_its_own_mistake(client: httpx2.Client) -> None:
    response = client.post("/v1/fanout", json={"tasks": ["echo", {"task": "caption", "text": "x"}]})
    first, second = response.json()["answers"]
    assert "output" in first
    assert (second["error"]["code"], second["error"]["param"]) == ("invalid_parameter", "text")


def test_a_picture_that_is_none_fails_every_task_with_its_status(client: httpx2.Client, decodings: list[str]) -> None:
    response = client.post("/v1/fanout", json={"tasks": ["echo", "caption"], "image": "bm90IGEgcGljdHVyZQ=="})
    assert problem(response) == (400, "malformed_image", "image")
    assert len(decodings) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "tasks"),
        ([], None),
        ({"tasks": []}, "tasks"),
        ({"tasks": "echo"}, "tasks"),
        ({"tasks": ["echo", 3]}, "tasks.1"),
        ({"tasks": [{"text": "x"}]}, "tasks.0.task"),
        ({"tasks": [{"task": "echo", "image": "x"}]}, "tasks.0.image"),
        ({"tasks": [{"task": "echo", "surprise": 1}]}, "tasks.0"),
        ({"tasks": ["x" * 65]}, "tasks.0.task"),
        ({"tasks": ["echo"] * 65}, "tasks"),
        ({"tasks": ["echo"], "text": "x" * 4097}, "text"),
        ({"tasks": ["echo"], "deadline_ms": 60_001}, "deadline_ms"),
        ({"tasks": ["echo"], "priority": "urgent"}, "priority"),
        ({"tasks": ["echo"], "stream": 1}, "stream"),
        ({"tasks": ["echo"], "surprise": 1}, None),
    ],
)
def test_invalid_parameters_of_a_fanout_are_named(client: httpx2.Client, body: Any, param: str | None) -> None:
    response = client.post("/v1/fanout", json=body)
    assert problem(response) == (422, "invalid_parameter", param)
    assert "surprise" not in response.text


def test_a_fanout_of_as_many_tasks_as_fit_is_answered(client: httpx2.Client) -> None:
    """The control of the limit above."""
    assert len(client.post("/v1/fanout", json={"tasks": ["echo"] * 64}).json()["answers"]) == 64


def test_a_client_that_leaves_cancels_all_its_tasks(client: httpx2.Client, engine: FakeEngine) -> None:
    body = json.dumps({"tasks": ["slow"] * 3}).encode()
    assert client.base_url.port is not None
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
        head = f"POST /v1/fanout HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        until(lambda: len(engine.futures) == 3)
    until(lambda: all(future.cancelled() for future in engine.futures))


def test_the_deadline_of_a_fanout_is_that_of_each_task(client: httpx2.Client) -> None:
    response = client.post("/v1/fanout", json={"tasks": ["slow", "echo"], "deadline_ms": 150})
    first, second = response.json()["answers"]
    assert first["error"]["code"] == "deadline_exceeded"
    assert "output" in second


def test_pixels_last_as_long_as_an_item_looks_at_them(decodings: list[str]) -> None:
    async def scenario() -> None:
        limits, decoders = ImageLimits(), anyio.CapacityLimiter(1)
        shared = pictures.Picture(picture())
        first, second = shared.shared(), shared.shared()
        image = weakref.ref(await first.decoded(limits, decoders))
        first.let_go()
        assert await second.decoded(limits, decoders) is image()
        second.let_go()
        gc.collect()
        assert image() is None
        assert len(decodings) == 1

    anyio.run(scenario)
