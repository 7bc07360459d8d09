"""A large file that is received, hashed and refused holds up nobody else's request (A-29)."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

import tiny
from api.registry_server import OCTETS
from load.served import Lag, LoopProbe, quantile, served, thread_probe
from promptmux_server.api import body
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.publisher import Publisher

SIZE = 40 << 20
HEAD = f"PUT /v1/prompts/a HTTP/1.1\r\nHost: x\r\nContent-Type: {OCTETS}\r\nX-Content-SHA256: {'0' * 64}\r\n"


def upload(port: int, times: int) -> list[int]:
    """Send a file over a plain socket, which costs this process little; the statuses that came back."""
    file, statuses = bytes(SIZE), []
    for _ in range(times):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(f"{HEAD}Content-Length: {SIZE}\r\n\r\n".encode())
            connection.sendall(file)
            statuses.append(int(connection.recv(65536).split(b" ", 2)[1]))
    return statuses


def lag_of(tmp_path: Path, times: int) -> Lag:
    lag = Lag()
    around: Any = lambda app: LoopProbe(app, lag)  # noqa: E731
    with (
        served(tmp_path, tiny.prompt("a"), options=EngineOptions(), around=around) as server,
        thread_probe(lag),
    ):
        assert upload(server.port, times) == [422] * times
        assert list((tmp_path / "registry" / "tmp").iterdir()) == []
    return lag


@pytest.fixture(autouse=True)
def large_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Publisher, "max_bytes", 2 * SIZE)


def is_smooth(lag: Lag) -> bool:
    return quantile(lag.loop, 0.99) <= 0.020 + 2 * quantile(lag.thread, 0.99)


def test_the_event_loop_runs_on_while_large_files_come_in(tmp_path: Path) -> None:
    assert is_smooth(lag_of(tmp_path, 4))


def test_a_file_that_is_handled_on_the_event_loop_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: whole, and at once."""

    async def at_once(work: Any, *arguments: Any, **_: Any) -> Any:
        return work(*arguments)

    monkeypatch.setattr(body, "PIECE_BYTES", 2 * SIZE)
    monkeypatch.setattr(body.anyio.to_thread, "run_sync", at_once)
    lag = lag_of(tmp_path, 1)
    assert max(lag.loop) > 0.020 + 2 * quantile(lag.thread, 0.99)
