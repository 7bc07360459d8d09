"""Ready means that an answer was computed; neither waiting work nor a bad file makes a live server look dead (A-23)."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from api.live_server import until
from load.callers import Reply, call, get, predict
from load.served import SlowDevice, served
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.request import Request
from promptmux_server.settings import Settings

SHORT = {"method": "greedy", "min_length": 2, "max_length": 2}
BODY = {"task": "a", "text": "the dog"}
RELOAD = b"POST /v1/tasks:reload HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def ask(port: int, data: bytes) -> Reply:
    return asyncio.run(call(port, data))


def statuses(port: int) -> tuple[int, int]:
    """Of /livez and /readyz."""
    return ask(port, get("/livez")).status, ask(port, get("/readyz")).status


@pytest.mark.parametrize("warm_up", [True, False])
def test_a_server_is_ready_once_its_warm_up_has_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_up: bool
) -> None:
    """Without a warm-up there is nothing to wait for: the control."""
    entered, go, encode, step = threading.Event(), threading.Event(), tiny.model().encode, tiny.model().step
    passes = []

    def held(*rest: Any) -> Any:
        entered.set()
        assert go.wait(20)
        passes.append("encode")
        return encode(*rest)

    monkeypatch.setattr(tiny.model(), "encode", held, raising=False)
    monkeypatch.setattr(tiny.model(), "step", lambda *rest: (passes.append("step"), step(*rest))[1], raising=False)
    options = EngineOptions(warm_up=warm_up)
    with served(tmp_path, tiny.prompt("a", decoding=SHORT), options=options) as server:
        if not warm_up:
            until(server.engine.ready)
            assert (statuses(server.port), passes) == ((200, 200), [])
            go.set()
            return
        assert entered.wait(20)
        assert statuses(server.port) == (200, 503)
        refused = ask(server.port, get("/readyz"))
        assert refused.retry_after is not None
        assert 1 <= int(refused.retry_after) <= 30
        go.set()
        until(server.engine.ready)
        assert set(passes) == {"encode", "step"}
        assert statuses(server.port) == (200, 200)
        assert not any(server.gauges().values())
        assert ask(server.port, predict(BODY)).status == 200


def test_waiting_work_and_bad_files_leave_a_server_live_and_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SlowDevice(monkeypatch, encode_s=0.03, step_s=0.05)
    options = EngineOptions(max_batch=2, queue_size=8, stalled_after_s=2.0)
    with served(tmp_path, tiny.prompt("a", decoding=SHORT), options=options, settings=Settings(queue_size=8)) as server:
        port, over = server.port, threading.Event()

        def crowd() -> None:
            async def client() -> None:
                while not over.is_set():
                    await call(port, predict(BODY))

            async def clients() -> None:
                await asyncio.gather(*(client() for _ in range(12)))

            asyncio.run(clients())

        asking = threading.Thread(target=crowd)
        asking.start()
        try:
            until(lambda: server.answers(503) > 0)  # the control: the queue was full
            for bad in (b"", b"garbage", (tmp_path / "a.safetensors").read_bytes()[:-7]):
                (tmp_path / "bad.safetensors").write_bytes(bad)
                report = ask(port, RELOAD)
                assert report.status == 200
                assert report.body["refused"].keys() == {"bad"}
                assert statuses(port) == (200, 200)
        finally:
            over.set()
            asking.join(30)
        assert ask(port, predict(BODY)).status == 200
        until(server.is_idle)


def test_a_device_that_hangs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: /livez can fail."""
    go, step = threading.Event(), tiny.model().step
    monkeypatch.setattr(tiny.model(), "step", lambda *rest: (go.wait(20), step(*rest))[1], raising=False)
    options = EngineOptions(stalled_after_s=1.0)
    with served(tmp_path, tiny.prompt("a", decoding=SHORT), options=options) as server:
        asked = server.engine.submit(Request(request_id="r", task="a", text="the dog", deadline=time.monotonic() + 30))
        until(lambda: statuses(server.port) == (503, 503))
        go.set()
        assert asked.result(20)
        until(lambda: statuses(server.port) == (200, 200))
