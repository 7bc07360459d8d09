"""`Client.trainings` and its twin that awaits, against scripted transports."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

import promptmux
from promptmux import AsyncClient, Client, ConnectionFailed
from promptmux._async_trainings import AsyncTrainings
from promptmux._trainings import Trainings

from .scripted import NO_WAIT, Script

ID = "3f0c1a"
TRAINING = {
    "id": ID,
    "object": "training",
    "task": "pets",
    "status": "succeeded",
    "cancel_requested": False,
    "priority": 2,
    "publish": True,
    "author": "ann",
    "attempts": 1,
    "max_attempts": 3,
    "created_at": 1764104400,
    "started_at": 1764104401,
    "finished_at": 1764104500,
    "metadata": {"a": "b"},
    "result": {
        "file": "runs/pets/pets.safetensors",
        "sha256": "ab",
        "metric": {"name": "accuracy", "value": 0.5, "n": 10},
        "publish": {"name": "pets", "published": True, "reason": "better", "version": 7, "served_score": 0.25},
    },
    "error": None,
    "config": "output = 1",
    "a_field_of_a_newer_server": 1,
}
Ask = Callable[..., Any]


def ok(document: Any = TRAINING, status: int = 200) -> httpx2.Response:
    return httpx2.Response(status, json=document)


def told(*events: tuple[int, str], cut: int = 0) -> httpx2.Response:
    """A stream, of which the last `cut` bytes are missing."""
    text = ": hello\n\n"
    for number, name in events:
        data = json.dumps({"number": number, "name": name, "at": 1764104400.5, "data": {"step": number}})
        text += f"id: {number}\nevent: {name}\ndata: {data}\n\n"
    return httpx2.Response(200, content=text[: len(text) - cut].encode())


def ask(script: Script, name: str, *args: Any, **given: Any) -> Any:
    """What a method of `Client.trainings` gives; all of what it yields."""
    with Client("http://server", transport=httpx2.MockTransport(script), retry=NO_WAIT) as client:
        answer = getattr(client.trainings, name)(*args, **given)
        return list(answer) if name in ("list", "events") else answer


def ask_async(script: Script, name: str, *args: Any, **given: Any) -> Any:
    """The same of the client that awaits."""

    async def talk() -> Any:
        async with AsyncClient("http://server", transport=httpx2.MockTransport(script), retry=NO_WAIT) as client:
            answer = getattr(client.trainings, name)(*args, **given)
            return [each async for each in answer] if name in ("list", "events") else await answer

    return asyncio.run(talk())


both = pytest.mark.parametrize("asking", [ask, ask_async], ids=["sync", "async"])


@both
def test_a_configuration_is_text_a_file_or_a_mapping(asking: Ask, tmp_path: Path) -> None:
    (tmp_path / "pets.toml").write_text("output = 'é'", encoding="utf-8")
    given: list[tuple[Any, Any]] = [
        ("output = 1", "output = 1"),
        (tmp_path / "pets.toml", "output = 'é'"),
        ({"output": "x"}, {"output": "x"}),
    ]
    for config, sent in given:
        script = Script(ok(status=201))
        taken = asking(script, "submit", config, priority=2, metadata={"a": "b"})
        assert script.sent == ["POST /v1/trainings"]
        body = json.loads(script.requests[0].content)
        assert body == {"config": sent, "priority": 2, "metadata": {"a": "b"}}
        assert taken.id == ID


@both
def test_a_submission_whose_answer_was_lost_is_sent_again_under_its_key(asking: Ask) -> None:
    script = Script(httpx2.ReadError("reset"), ok({}, 503), ok(status=201))
    asking(script, "submit", "x = 1")
    asking_again = Script(ok(status=201))
    asking(asking_again, "submit", "x = 1")
    keys = [request.headers["idempotency-key"] for request in script.requests]
    assert len(set(keys)) == 1
    assert asking_again.requests[0].headers["idempotency-key"] != keys[0]
    given = Script(ok(status=201))
    asking(given, "submit", "x = 1", idempotency_key="mine")
    assert given.requests[0].headers["idempotency-key"] == "mine"


@both
def test_a_training_is_typed(asking: Ask) -> None:
    training = asking(Script(ok()), "get", ID)
    assert (training.ended, training.created_at.year, training.metadata) == (True, 2025, {"a": "b"})
    assert training.result.metric["value"] == 0.5
    assert (training.result.publish.published, training.result.publish.version) == (True, 7)
    failed = {**TRAINING, "status": "failed", "result": None, "error": {"code": "x", "message": "y", "param": None}}
    assert asking(Script(ok(failed)), "get", ID).error.code == "x"


@both
def test_a_list_of_trainings_goes_from_page_to_page(asking: Ask) -> None:
    pages = [
        {"trainings": [{**TRAINING, "id": "b"}], "next": "b"},
        {"trainings": [{**TRAINING, "id": "a"}], "next": None},
    ]
    script = Script(*map(ok, pages))
    assert [training.id for training in asking(script, "list", status="succeeded")] == ["b", "a"]
    assert script.sent == ["GET /v1/trainings?status=succeeded", "GET /v1/trainings?status=succeeded&after=b"]


@both
def test_an_end_may_be_asked_for_again(asking: Ask) -> None:
    script = Script(httpx2.ReadError("reset"), ok())
    assert asking(script, "cancel", ID).id == ID
    assert script.sent == [f"DELETE /v1/trainings/{ID}"] * 2


@both
def test_events_come_in_order_to_the_end(asking: Ask) -> None:
    script = Script(told((1, "queued"), (2, "step"), (3, "succeeded")))
    events = asking(script, "events", ID)
    assert [(event.number, event.name, event.data) for event in events][1] == (2, "step", {"step": 2})
    assert (len(events), events[0].at.year) == (3, 2025)
    assert "last-event-id" not in script.requests[0].headers


@both
def test_a_stream_of_events_that_breaks_off_is_taken_up_where_it_was(asking: Ask) -> None:
    script = Script(
        told((1, "queued"), (2, "step"), cut=5),
        httpx2.ReadError("reset"),
        told(),
        told((2, "step"), (3, "score")),
        told((4, "cancelled")),
    )
    assert [event.number for event in asking(script, "events", ID)] == [1, 2, 3, 4]
    assert [request.headers.get("last-event-id") for request in script.requests] == [None, "1", "1", "1", "3"]


@both
def test_a_stream_that_never_goes_on_is_given_up(asking: Ask) -> None:
    script = Script(told((1, "queued")), told(), told(), told())
    with pytest.raises(ConnectionFailed, match="before the training did"):
        asking(script, "events", ID)
    assert len(script.requests) == 3


@both
def test_behind_the_last_event_nothing_comes(asking: Ask) -> None:
    script = Script(httpx2.Response(204))
    assert asking(script, "events", ID, after=9) == []
    assert script.requests[0].headers["last-event-id"] == "9"


@both
@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "trainings_off", promptmux.Forbidden),
        (404, "job_not_found", promptmux.NotFound),
        (409, "job_conflict", promptmux.Conflict),
        (422, "invalid_training_config", promptmux.InvalidRequest),
    ],
)
def test_a_refused_training_has_the_class_of_its_status(
    asking: Ask, status: int, code: str, kind: type[promptmux.APIStatusError]
) -> None:
    error = {"code": code, "message": "No.", "param": "config.steps", "details": {"mistakes": [{"line": 3}]}}
    for name, argument in (("submit", "x"), ("get", ID), ("cancel", ID), ("events", ID)):
        with pytest.raises(kind) as caught:
            asking(Script(httpx2.Response(status, json={"error": error})), name, argument)
        assert (caught.value.param, caught.value.details) == ("config.steps", {"mistakes": [{"line": 3}]})


@both
@pytest.mark.parametrize("name", ["get", "cancel", "events"])
@pytest.mark.parametrize("training_id", ["", "..", "a/b", "a%2fb", "x" * 65, "a?x"])
def test_what_cannot_be_an_id_is_not_sent(asking: Ask, name: str, training_id: str) -> None:
    with pytest.raises(ValueError, match="a training's id"):
        asking(Script(), name, training_id)


@both
def test_an_answer_about_trainings_that_is_not_understood_is_an_error(asking: Ask) -> None:
    for name, body in (("get", {"id": 3}), ("get", []), ("list", {})):
        with pytest.raises(promptmux.ServerError, match="not understood"):
            asking(Script(ok(body)), name, *(() if name == "list" else (ID,)))
    broken = httpx2.Response(200, content=b"event: step\ndata: {}\n\n")
    with pytest.raises(promptmux.ServerError, match="not understood"):
        asking(Script(broken), "events", ID)


def test_both_clients_have_the_same_methods_for_trainings() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        public = {name: method for name, method in vars(kind).items() if not name.startswith("_")}
        return {name: list(inspect.signature(method).parameters) for name, method in public.items()}

    assert methods(Trainings) == methods(AsyncTrainings)
