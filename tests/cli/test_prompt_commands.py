"""`promptmux prompts` against a server that answers as it is told: what is sent, written and said."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.scripted_server import Scripted, scripted_server
from promptmux_server.cli import app
from promptmux_server.cli.output import transfer_bar
from shared_files import ROOT

CAPTION = ROOT / "prompts" / "library" / "scene-caption.safetensors"
FILE = CAPTION.read_bytes()
SHA256 = hashlib.sha256(FILE).hexdigest()
VERSION = {
    "name": "vqa",
    "version": 7,
    "sha256": "ab" * 32,
    "file_sha256": SHA256,
    "bytes": len(FILE),
    "encoder_length": 32,
    "decoder_length": 16,
    "created": "2026-01-02T03:04:05Z",
    "author": "trainer",
    "current": True,
    "pinned": True,
}
OTHERS = {**VERSION, "version": 8, "file_sha256": "cd" * 32, "author": "somebody"}


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as scripted:
        yield scripted


def run(server: Scripted, *arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(app, ["prompts", *arguments, "--url", server.address], input=input)


def said(server: Scripted, *arguments: str) -> str:
    """The standard output of a command that succeeds."""
    done = run(server, *arguments)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def refused(server: Scripted, *arguments: str) -> str:
    """The standard error of one that does not."""
    done = run(server, *arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    return done.stderr


@pytest.mark.parametrize("command", ["list", "versions", "push", "pull", "rollback", "pin", "unpin", "delete"])
def test_every_command_about_prompts_shows_an_example(command: str) -> None:
    shown = CliRunner().invoke(app, ["prompts", command, "--help"])
    assert f"promptmux prompts {command}" in shown.stdout
    assert "--json" in shown.stdout


def test_a_push_takes_its_name_from_the_file_unless_it_is_given(server: Scripted) -> None:
    server.answers |= {f"PUT /v1/prompts/{name}": (201, {**VERSION, "name": name}) for name in ("scene-caption", "vqa")}
    assert said(server, "push", str(CAPTION)).startswith("scene-caption@7 is served now: 32+16 positions")
    document = json.loads(said(server, "push", str(CAPTION), "--name", "vqa", "--if-version", "6", "--json"))
    assert (document["name"], document["version"], document["created"]) == ("vqa", 7, "2026-01-02T03:04:05Z")
    assert server.calls == ["PUT /v1/prompts/scene-caption", "PUT /v1/prompts/vqa"]
    _, body, headers = server.asked[1]
    assert (body, headers["x-content-sha256"], headers["if-match"]) == (FILE, SHA256, '"6"')


def test_a_file_that_is_no_prompt_file_is_not_sent_for_want_of_a_name(server: Scripted, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(FILE[:100])
    assert "is not a prompt file: the file ends inside its header" in refused(server, "push", str(tmp_path / "x"))
    assert server.calls == []


@pytest.mark.parametrize(
    "command", [("push", str(CAPTION), "--name", "vqa"), ("rollback", "vqa"), ("delete", "vqa", "--yes")]
)
def test_who_comes_too_late_learns_where_the_prompt_is_and_how_to_go_on(
    server: Scripted, command: tuple[str, ...]
) -> None:
    for call in ("PUT /v1/prompts/vqa", "POST /v1/prompts/vqa/rollback", "DELETE /v1/prompts/vqa"):
        server.refuse(call, 412, "version_mismatch")
    server.answers["GET /v1/prompts/vqa"] = (200, OTHERS)
    explained = refused(server, *command, "--if-version", "6")
    assert "vqa is at version 8, published by somebody at 2026-01-02 03:04:05 UTC; nothing was changed" in explained
    assert "--if-version 8" in explained
    del server.answers["GET /v1/prompts/vqa"]
    assert "vqa does not exist" in refused(server, *command, "--if-version", "6")


def test_a_failed_canary_shows_both_outputs_one_below_the_other(server: Scripted) -> None:
    details = {"index": 2, "expected": [12, 845, 9, 2], "got": [12, 7, 9]}
    server.refuse("PUT /v1/prompts/vqa", 422, "canary_failed", details=details)
    explained = refused(server, "push", str(CAPTION), "--name", "vqa")
    assert "canary 2" in explained
    assert "  expected  12 845 9   2\n  got       12 [7] 9 [-]\nNothing was published." in explained
    server.refuse("PUT /v1/prompts/vqa", 422, "canary_failed", details={"reason": "no_effect"})
    assert "its numbers have no effect" in refused(server, "push", str(CAPTION), "--name", "vqa")


@pytest.mark.parametrize(
    ("status", "code", "explained"),
    [
        (401, "unauthorized", "PROMPTMUX_API_KEY"),
        (403, "forbidden", "to change prompts and to fetch files it needs the scope `admin`"),
        (507, "storage_full", "No. [storage_full]"),
        (422, "canary_failed", "No. [canary_failed]\nNothing was published."),
    ],
)
def test_another_refusal_is_explained(server: Scripted, status: int, code: str, explained: str) -> None:
    server.refuse("PUT /v1/prompts/vqa", status, code)
    assert explained in refused(server, "push", str(CAPTION), "--name", "vqa")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_pull_writes_the_present_version_or_the_one_named(server: Scripted, folder: Path) -> None:
    server.answers["GET /v1/prompts/vqa"] = (200, VERSION)
    for version in (7, 3):
        file = (FILE, {"X-Content-SHA256": SHA256})
        server.answers[f"GET /v1/prompts/vqa/versions/{version}/file"] = (200, file)
    assert said(server, "pull", "vqa").startswith("vqa@7 -> vqa@7.safetensors")
    report = json.loads(said(server, "pull", "vqa@3", "-o", "here", "--json"))
    assert report == {"name": "vqa", "version": 3, "bytes": len(FILE), "file": "here"}
    assert {path.name for path in folder.iterdir()} == {"vqa@7.safetensors", "here"}
    assert all(path.read_bytes() == FILE for path in folder.iterdir())


def test_a_pull_overwrites_only_when_told_to_and_never_with_a_damaged_file(server: Scripted, folder: Path) -> None:
    (folder / "here").write_bytes(b"mine")
    call = "GET /v1/prompts/vqa/versions/7/file"
    server.answers[call] = (200, (FILE[:-1], {"X-Content-SHA256": SHA256}))
    assert "--force" in refused(server, "pull", "vqa@7", "-o", "here")
    assert server.calls == []
    assert "ask for it again" in refused(server, "pull", "vqa@7", "-o", "here", "--force")
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("here", b"mine")]
    server.answers[call] = (200, (FILE, {"X-Content-SHA256": SHA256}))
    said(server, "pull", "vqa@7", "-o", "here", "--force")
    assert (folder / "here").read_bytes() == FILE
    assert "cannot be written" in refused(server, "pull", "vqa@7", "-o", "nowhere/here")


@pytest.mark.parametrize("prompt", ["vqa@", "vqa@0", "vqa@x", "vqa@-1"])
def test_a_version_is_a_number(server: Scripted, prompt: str) -> None:
    assert "a version is a number" in refused(server, "pull", prompt)


def test_what_cannot_be_a_name_is_explained(server: Scripted) -> None:
    assert "a prompt's name" in refused(server, "versions", "../x")
    assert server.calls == []


def test_lists_are_tables_or_json(server: Scripted) -> None:
    answer: dict[str, Any] = {"prompts": [VERSION, {**VERSION, "name": "caption", "pinned": False}], "next": None}
    server.answers["GET /v1/prompts?limit=500"] = (200, answer)
    server.answers["GET /v1/prompts/vqa/versions"] = (
        200,
        {"versions": [VERSION, {**VERSION, "version": 6, "current": False}]},
    )
    lines = said(server, "list").splitlines()
    assert [line.split()[:2] for line in lines] == [["prompt", "version"], ["vqa", "7"], ["caption", "7"]]
    assert ["pinned" in line for line in lines] == [False, True, False]
    lines = said(server, "versions", "vqa").splitlines()
    assert ["served" in line for line in lines] == [False, True, False]
    assert [version["name"] for version in json.loads(said(server, "list", "--json"))] == ["vqa", "caption"]
    assert [version["version"] for version in json.loads(said(server, "versions", "vqa", "--json"))] == [7, 6]


@pytest.mark.parametrize(
    ("command", "call", "body", "line"),
    [
        (("rollback", "vqa", "--to", "7"), "rollback", b'{"version":7}', "vqa@7 is served again"),
        (("rollback", "vqa"), "rollback", b"{}", "vqa@7 is served again"),
        (("pin", "vqa"), "pin", b"", "vqa stays on the device"),
        (("unpin", "vqa"), "unpin", b"", "vqa may leave the device"),
    ],
)
def test_a_change_says_what_holds_now(
    server: Scripted, command: tuple[str, ...], call: str, body: bytes, line: str
) -> None:
    server.answers[f"POST /v1/prompts/vqa/{call}"] = (200, VERSION)
    assert said(server, *command).startswith(line)
    assert json.loads(said(server, *command, "--json"))["version"] == 7
    assert [(asked, sent) for asked, sent, _ in server.asked] == [(f"POST /v1/prompts/vqa/{call}", body)] * 2


def test_nothing_is_deleted_before_somebody_has_agreed(server: Scripted) -> None:
    server.answers["DELETE /v1/prompts/vqa"] = (204, None)
    assert "--yes" in refused(server, "delete", "vqa")
    assert server.calls == []
    assert said(server, "delete", "vqa", "--yes") == "vqa is deleted\n"
    assert json.loads(said(server, "delete", "vqa", "-y", "--json")) == {"deleted": "vqa"}


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_transfer_shows_itself_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    with transfer_bar("vqa") as progress:
        progress(1000, 4000)
        progress(4000, 4000)
    assert ("vqa: sent, and checked there" in shown.getvalue()) is is_terminal
    assert ("4.0 kB" in shown.getvalue()) is is_terminal
