"""`Client.prompts` and its twin that awaits, against scripted transports and a server that hangs up."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

import promptmux
from promptmux import AsyncClient, CanaryFailed, Client, ConnectionFailed, CorruptDownload, VersionMismatch
from promptmux._async_prompts import AsyncPrompts
from promptmux._prompts import Prompts
from promptmux._upload import PIECE_BYTES

from .scripted import NO_WAIT, Script

FILE = b"a prompt file" * 20_000
SHA256 = hashlib.sha256(FILE).hexdigest()
VERSION = {
    "name": "vqa",
    "version": 7,
    "sha256": "ab" * 32,
    "file_sha256": SHA256,
    "bytes": len(FILE),
    "encoder_length": 32,
    "decoder_length": 32,
    "created": "2026-01-02T03:04:05Z",
    "author": "trainer",
    "current": True,
    "pinned": False,
    "manifest": {"kind": "answer"},
    "a_field_of_a_newer_server": 1,
}
OTHERS = {**VERSION, "version": 8, "file_sha256": "cd" * 32}


def ok(document: Any = VERSION, status: int = 200) -> httpx2.Response:
    return httpx2.Response(status, json=document)


def refusal(status: int, code: str, **error: Any) -> httpx2.Response:
    return httpx2.Response(status, json={"error": {"code": code, "message": "No.", **error}})


def lost() -> httpx2.ReadError:
    return httpx2.ReadError("reset")


Ask = Callable[..., Any]


def ask(script: Script, name: str, *args: Any, **given: Any) -> Any:
    """What a method of `Client.prompts` gives; all of what it yields."""
    with Client("http://server", transport=httpx2.MockTransport(script), retry=NO_WAIT, api_key="k") as client:
        answer = getattr(client.prompts, name)(*args, **given)
        return list(answer) if name == "list" else answer


def ask_async(script: Script, name: str, *args: Any, **given: Any) -> Any:
    """The same of the client that awaits."""

    async def talk() -> Any:
        transport = httpx2.MockTransport(script)
        async with AsyncClient("http://server", transport=transport, retry=NO_WAIT, api_key="k") as client:
            answer = getattr(client.prompts, name)(*args, **given)
            return [version async for version in answer] if name == "list" else await answer

    return asyncio.run(talk())


both = pytest.mark.parametrize("asking", [ask, ask_async], ids=["sync", "async"])


@both
def test_a_push_sends_the_bytes_with_their_digest_and_tells_how_far_it_is(asking: Ask, tmp_path: Path) -> None:
    (tmp_path / "vqa.safetensors").write_bytes(FILE)
    script, told = Script(ok(status=201)), []
    pushed = asking(script, "push", "vqa", tmp_path / "vqa.safetensors", progress=lambda *sent: told.append(sent))
    request = script.requests[0]
    assert (script.sent, request.content) == (["PUT /v1/prompts/vqa"], FILE)
    headers = {name: request.headers.get(name) for name in ("content-type", "content-length", "x-content-sha256")}
    assert list(headers.values()) == ["application/octet-stream", str(len(FILE)), SHA256]
    assert "transfer-encoding" not in request.headers  # the size must be known before the body is read
    assert request.headers["authorization"] == "Bearer k"
    assert [sent for sent, _ in told] == [*range(0, len(FILE), PIECE_BYTES), len(FILE)]
    assert {total for _, total in told} == {len(FILE)}
    assert (str(pushed), pushed.manifest, pushed.created.year) == ("vqa@7", {"kind": "answer"}, 2026)


@both
@pytest.mark.parametrize(
    ("given", "header", "value"),
    [({"if_version": 6}, "if-match", '"6"'), ({"create_only": True}, "if-none-match", "*"), ({}, "if-match", None)],
)
def test_a_condition_is_a_header(asking: Ask, given: dict[str, Any], header: str, value: str | None) -> None:
    script = Script(ok())
    asking(script, "push", "vqa", FILE, **given)
    assert script.requests[0].headers.get(header) == value


@both
def test_a_push_whose_answer_was_lost_is_sent_again_whole_and_ends_in_its_version(asking: Ask) -> None:
    script = Script(lost(), refusal(503, "overloaded"), ok())
    assert asking(script, "push", "vqa", FILE).version == 7
    assert [request.content == FILE for request in script.requests] == [True] * 3


@both
@pytest.mark.parametrize("given", [{"if_version": 6}, {"create_only": True}])
def test_a_version_that_a_lost_try_has_published_is_no_mismatch(asking: Ask, given: dict[str, Any]) -> None:
    script = Script(lost(), refusal(412, "version_mismatch"), ok())
    assert asking(script, "push", "vqa", FILE, **given).version == 7
    assert script.sent == ["PUT /v1/prompts/vqa"] * 2 + ["GET /v1/prompts/vqa"]


@both
@pytest.mark.parametrize(("status", "found"), [(200, OTHERS), (200, {**VERSION, "version": 5}), (404, {}), (403, {})])
def test_what_somebody_else_has_published_is_a_mismatch(asking: Ask, status: int, found: dict[str, Any]) -> None:
    with pytest.raises(VersionMismatch) as caught:
        asking(Script(refusal(412, "version_mismatch"), ok(found, status)), "push", "vqa", FILE, if_version=6)
    assert (caught.value.status, caught.value.code) == (412, "version_mismatch")


@both
@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "version_not_found", promptmux.VersionNotFound),
        (409, "registry_full", promptmux.RegistryFull),
        (409, "prompt_conflict", promptmux.Conflict),
        (422, "prompt_nonfinite", promptmux.InvalidRequest),
        (503, "storage_failed", promptmux.StorageFailed),
        (507, "storage_full", promptmux.StorageFull),
    ],
)
def test_a_refusal_has_the_class_of_its_code(asking: Ask, status: int, code: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        asking(Script(*[refusal(status, code)] * 3), "push", "vqa", FILE)
    assert type(caught.value) is kind


@both
def test_a_failed_canary_says_what_was_expected_and_what_came(asking: Ask) -> None:
    details = {"index": 0, "expected": [4, 5], "got": [4, 6]}
    with pytest.raises(CanaryFailed) as caught:
        asking(Script(refusal(422, "canary_failed", details=details)), "push", "vqa", FILE)
    assert caught.value.details == details


@both
def test_a_pull_gives_the_present_file_or_that_of_a_version(asking: Ask) -> None:
    def file() -> httpx2.Response:
        return httpx2.Response(200, content=FILE, headers={"x-content-sha256": SHA256})

    script = Script(ok(), file(), file())
    assert asking(script, "pull", "vqa") == asking(script, "pull", "vqa", 3) == FILE
    assert script.sent == [
        "GET /v1/prompts/vqa",
        "GET /v1/prompts/vqa/versions/7/file",
        "GET /v1/prompts/vqa/versions/3/file",
    ]


@both
@pytest.mark.parametrize(
    ("data", "headers"),
    [(FILE[:-1], {"x-content-sha256": SHA256}), (FILE, {"x-content-sha256": "0" * 64}), (FILE, {})],
    ids=["cut off", "another digest", "no digest"],
)
def test_a_file_that_is_not_the_announced_one_is_never_given(asking: Ask, data: bytes, headers: dict[str, str]) -> None:
    with pytest.raises(CorruptDownload):
        asking(Script(httpx2.Response(200, content=data, headers=headers)), "pull", "vqa", 7)


@both
def test_a_list_goes_from_page_to_page(asking: Ask) -> None:
    pages = [
        {"prompts": [{**VERSION, "name": "a"}, {**VERSION, "name": "b"}], "next": "b"},
        {"prompts": [{**VERSION, "name": "c"}], "next": None},
    ]
    script = Script(*map(ok, pages))
    assert [version.name for version in asking(script, "list")] == ["a", "b", "c"]
    assert script.sent == ["GET /v1/prompts?limit=500", "GET /v1/prompts?limit=500&after=b"]


@both
@pytest.mark.parametrize(
    ("name", "given", "call", "body", "condition"),
    [
        ("rollback", {}, "POST /v1/prompts/vqa/rollback", b"{}", None),
        ("rollback", {"to": 6, "if_version": 7}, "POST /v1/prompts/vqa/rollback", b'{"version":6}', '"7"'),
        ("pin", {}, "POST /v1/prompts/vqa/pin", b"", None),
        ("unpin", {}, "POST /v1/prompts/vqa/unpin", b"", None),
        ("get", {}, "GET /v1/prompts/vqa", b"", None),
    ],
)
def test_what_answers_with_a_version(
    asking: Ask, name: str, given: dict[str, Any], call: str, body: bytes, condition: str | None
) -> None:
    script = Script(ok())
    assert asking(script, name, "vqa", **given).version == 7
    assert (script.sent, script.requests[0].content) == ([call], body)
    assert script.requests[0].headers.get("if-match") == condition


@both
def test_the_versions_of_a_name_and_its_end(asking: Ask) -> None:
    script = Script(ok({"name": "vqa", "current": 7, "versions": [OTHERS, VERSION]}), httpx2.Response(204))
    assert [version.version for version in asking(script, "versions", "vqa")] == [8, 7]
    assert asking(script, "delete", "vqa", if_version=8) is None
    assert script.sent == ["GET /v1/prompts/vqa/versions", "DELETE /v1/prompts/vqa"]
    assert script.requests[1].headers["if-match"] == '"8"'


@both
@pytest.mark.parametrize("name", ["rollback", "delete"])
def test_a_step_back_is_never_taken_twice(asking: Ask, name: str) -> None:
    script = Script(lost())
    with pytest.raises(ConnectionFailed, match="look whether the change was made"):
        asking(script, name, "vqa")
    assert len(script.requests) == 1
    untouched = Script(httpx2.ConnectError("no"), refusal(429, "rate_limited"), ok())
    asking(untouched, name, "vqa")
    assert len(untouched.requests) == 3


@both
@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "A", "a..b", "a%2fb", "x" * 65, "vqa?x"])
def test_what_cannot_be_a_name_is_not_sent(asking: Ask, name: str) -> None:
    with pytest.raises(ValueError, match="a prompt's name"):
        asking(Script(), "get", name)


@both
def test_two_conditions_contradict_each_other(asking: Ask) -> None:
    with pytest.raises(ValueError, match="not both"):
        asking(Script(), "push", "vqa", FILE, if_version=1, create_only=True)


@both
@pytest.mark.parametrize(("name", "body"), [("get", []), ("get", {"name": "vqa"}), ("list", {}), ("versions", {})])
def test_an_answer_about_prompts_that_is_not_understood_is_an_error(asking: Ask, name: str, body: Any) -> None:
    with pytest.raises(promptmux.ServerError, match="not understood"):
        asking(Script(ok(body)), name, *(() if name == "list" else ("vqa",)))


@both
def test_a_connection_that_breaks_under_a_file_is_explained(asking: Ask) -> None:
    with pytest.raises(ConnectionFailed, match=r"key or the file's size .*: WriteError"):
        asking(Script(*[httpx2.WriteError("")] * 3), "push", "vqa", FILE)


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        public = {name: method for name, method in vars(kind).items() if not name.startswith("_")}
        return {name: list(inspect.signature(method).parameters) for name, method in public.items()}

    assert methods(Prompts) == methods(AsyncPrompts)


def test_tasks_are_listed_from_page_to_page_with_where_they_come_from() -> None:
    ready = {
        "name": "a",
        "state": "ready",
        "provenance": {"steps": 9},
        "encoder_layers": [0, 2],
        "author": "trainer",
        "created": "2026-01-02T03:04:05Z",
    }
    refused = {"name": "b", "state": "refused", "provenance": None, "author": None, "created": None}
    script = Script(ok({"tasks": [ready], "next": "a"}), ok({"tasks": [refused], "next": None}))
    with Client("http://server", transport=httpx2.MockTransport(script)) as client:
        first, second = client.tasks()
    assert (first.name, first.provenance, first.author) == ("a", {"steps": 9}, "trainer")
    assert (first.encoder_layers, first.decoder_layers) == ((0, 2), None)
    assert (second.name, second.created) == ("b", None)
    assert script.sent == ["GET /v1/tasks", "GET /v1/tasks?after=a"]


def test_a_server_that_refuses_early_is_heard_although_it_reads_no_further() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    body = b'{"error": {"code": "body_too_large", "message": "Too much."}}'

    def refuse() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1024)
            head = (
                b"HTTP/1.1 413 X\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            )
            connection.sendall(head % len(body) + body)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):  # a server that closes with unread bytes resets the connection
                pass

    thread = threading.Thread(target=refuse, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with Client(address, retry=NO_WAIT) as client, pytest.raises(promptmux.TooLarge, match="Too much"):
        client.prompts.push("vqa", bytes(8_000_000))
    thread.join(20)
    listener.close()
