"""Names are not paths (A-09): whatever is given as one is refused on every route, and nothing outside is touched."""

from __future__ import annotations

import hashlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote_from_bytes

import pytest
from structlog.testing import capture_logs

from api.live_server import until
from api.registry_server import OCTETS, Served, serving, small
from promptmux_prompts import write_prompt
from promptmux_server.api.access import RULES

ROUTES = (
    ("PUT", ""),
    ("GET", ""),
    ("DELETE", ""),
    ("GET", "/versions"),
    ("GET", "/versions/1/file"),
    ("POST", "/rollback"),
    ("POST", "/pin"),
    ("POST", "/unpin"),
)
FILE = write_prompt(small())
MARKER = "pl4nted"

HOSTILE: list[bytes] = [
    b"..", b".", b"...", b"../", b"../..", b"../../etc/passwd", b"..\\..", b"a/../b", b"a/b", b"/etc/passwd",
    b"//proc/self/root", b"file:///etc/passwd", b"http:///#/../..", b"~", b"~root", b"$HOME", b"%2e%2e",
    b"%252e%252e%252f", b"\x00", b"a\x00b", b"a\r\nX-Injected: 1", b"a\n{\"event\": \"pl4nted\"}", b"\x1b[2Jpl4nted",
    b"\t", b" ", b" a", b"a ", b"CON", b"con..", b"NUL", b"A", b"-a", b".hidden", b"_a", b"a..b", b"HEAD.json",
    b"\xff\xfe", b"\xed\xa0\x80", "\u202etxt.exe".encode(), "\uff0e\uff0e".encode(), "\u2025".encode(),
    "a\u0301".encode(), b"a" * 65, b"a" * 4096,
    b"a?b", b"a#b", b"a;b", b"a%", b"*", b"a|b", b"<script>", b"'; drop table prompts; --",
]  # fmt: skip
PLAIN = (b"lock", b"refs", b"con.")
"""Names like any other: the control."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served")) as running:
        assert running.put("good", small("good")).status_code == 201
        yield running


def tree(root: Path) -> dict[str, str]:
    """Everything under a folder with the digest of its content."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(root.rglob("*"))
        if "registry" not in path.relative_to(root).parts
    }


def status(served: Served, method: str, name: bytes, rest: str) -> int:
    """Of a request whose path holds these bytes, which no client library has tidied up."""
    body = FILE if method == "PUT" else b"{}" if method == "POST" else b""
    head = [
        f"{method} /v1/prompts/{quote_from_bytes(name, safe='')}{rest} HTTP/1.1",
        "Host: x",
        f"Content-Type: {OCTETS if method == 'PUT' else 'application/json'}",
        f"X-Content-SHA256: {hashlib.sha256(FILE).hexdigest()}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert b"X-Injected" not in answer
    return int(answer.split(b" ", 2)[1])


def generated(count: int) -> list[bytes]:
    rng = random.Random(9)
    pieces = [b"..", b"/", b"\\", b"\x00", b"%2f", b"a", b"\r\n", b":", "\u202e".encode(), b".", b"\xff"]
    ends = [b"/", b"..", b"\x00", b" "]
    return [b"".join(rng.choices(pieces, k=rng.randint(1, 8))) + rng.choice(ends) for _ in range(count)]


def refused_everywhere(served: Served, names: list[bytes]) -> None:
    outside, inside = tree(served.root.parent), served.client.get("/v1/prompts").json()
    folders = {folder: served.files(folder) for folder in ("blobs", "refs", "tmp", "quarantine")}
    for name in names:
        for method, rest in ROUTES:
            # A name with a slash is another path, which may have no such route or no such method.
            refusals = (404, 405, 422) if method == "PUT" else (404, 405)
            assert status(served, method, name, rest) in refusals, (method, name, rest)
    assert tree(served.root.parent) == outside
    assert served.client.get("/v1/prompts").json() == inside
    assert {folder: served.files(folder) for folder in folders} == folders


def test_hostile_names_are_refused_on_every_route(served: Served) -> None:
    refused_everywhere(served, HOSTILE)


def test_made_up_names_are_refused_on_every_route(served: Served) -> None:
    refused_everywhere(served, generated(40))


@pytest.mark.soak
def test_a_thousand_names_are_refused_on_every_route(served: Served) -> None:
    refused_everywhere(served, generated(1000))


def test_the_control_a_plain_name_is_published(served: Served) -> None:
    for name in PLAIN:
        assert status(served, "PUT", name, "") == 201
        assert served.ask(name.decode())["prompt"]["version"] == 1


@pytest.mark.parametrize("name", ["..", "../good", "a\x00b", "a\nb", "A", "a" * 64 + "!", "\u202e", ""])
def test_a_task_is_looked_up_by_its_name_and_nothing_else(served: Served, name: str) -> None:
    for path, body in (
        ("/v1/predict", {"items": [{"task": name, "text": "x"}]}),
        ("/v1/fanout", {"tasks": [name], "text": "x"}),
    ):
        assert served.client.post(path, json=body).status_code in (404, 422)


def test_links_that_somebody_planted_lead_nowhere(served: Served) -> None:
    outside = served.root.parent / "outside"
    outside.mkdir()
    (outside / "HEAD.json").write_text("{}")
    (served.root / "refs" / "linked").symlink_to(outside, target_is_directory=True)
    (served.root / "tmp" / "planted").symlink_to(outside / "HEAD.json")
    before = tree(served.root.parent)
    assert status(served, "GET", b"linked", "") == 404
    assert status(served, "PUT", b"linked", "") in (404, 422, 503)
    assert served.client.post("/v1/tasks:reload").status_code == 200
    assert tree(served.root.parent) == before
    assert (outside / "HEAD.json").read_text() == "{}"
    (served.root / "refs" / "linked").unlink()
    (served.root / "tmp" / "planted").unlink()


def test_no_name_reaches_the_log(served: Served) -> None:
    with capture_logs() as logs:
        names = [name for name in HOSTILE if MARKER.encode() in name]
        for name in names:
            for method, rest in ROUTES:
                status(served, method, name, rest)
        until(lambda: sum(entry["event"] == "request" for entry in logs) == len(names) * len(ROUTES))
    assert MARKER not in repr(logs)
    assert {entry["route"] for entry in logs} <= {path for _, path in RULES}
