"""How the process ends, and what signals do: seen from outside, on a process of our own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from api.live_server import until
from promptmux_server.api.serving import EXIT_DEVICE_LOST

PROGRAM = """
import sys
from api.fake_engine import FakeEngine
from promptmux_server.api.app import build_app
from promptmux_server.api.serving import serve
from promptmux_server.settings import Settings
port, metrics_port, delay, timeout = sys.argv[1:]
settings = Settings(port=port, metrics_port=metrics_port, drain_delay_s=delay, drain_timeout_s=timeout)
engine = FakeEngine()
serve(build_app(engine, settings, "fake"), engine, settings)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server process of our own, and a client for it."""

    def __init__(self, delay_s: float, timeout_s: float) -> None:
        self.port, self.metrics_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = [str(value) for value in (self.port, self.metrics_port, delay_s, timeout_s)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Server:
        until(lambda: self.status("/readyz") == 200)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(10)

    def status(self, path: str) -> int | None:
        """None = connection refused."""
        try:
            return httpx2.get(self.url + path, timeout=5).status_code
        except httpx2.TransportError:
            return None


@pytest.mark.parametrize("delay_s", [0.5, 1.5])
def test_sigterm_turns_readiness_off_keeps_serving_for_the_delay_then_refuses_and_exits_0(delay_s: float) -> None:
    with Server(delay_s, 5) as server:
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        until(lambda: server.status("/readyz") == 503)
        served = httpx2.post(f"{server.url}/v1/predict", json={"task": "echo"})
        assert served.status_code == 200
        until(lambda: server.status("/livez") is None)
        assert time.monotonic() - started >= delay_s
        assert server.process.wait(10) == 0
        assert time.monotonic() - started < delay_s + 3


def test_a_request_over_the_drain_timeout_gets_503_and_not_500() -> None:
    with Server(0.0, 1.0) as server:
        replies: list[httpx2.Response] = []
        body = {"task": "slow", "deadline_ms": 60_000}
        asking = threading.Thread(
            target=lambda: replies.append(httpx2.post(f"{server.url}/v1/predict", json=body, timeout=30))
        )
        asking.start()
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        asking.join(20)
        assert (replies[0].status_code, replies[0].json()["error"]["code"]) == (503, "draining")
        assert server.process.wait(10) == 0


def test_a_second_signal_ends_the_process_within_two_seconds() -> None:
    with Server(30, 30) as server:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.status("/readyz") == 503)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(2)


def test_a_lost_device_answers_503_everywhere_and_ends_the_process() -> None:
    with Server(0, 1) as server:
        reply = httpx2.post(f"{server.url}/v1/predict", json={"task": "assert"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "backend_unhealthy")
        assert server.status("/livez") == 503
        assert server.status("/readyz") == 503
        assert server.process.wait(10) == EXIT_DEVICE_LOST


def test_sighup_reads_the_prompts_again_and_serves_on_and_metrics_have_their_own_port() -> None:
    with Server(0, 1) as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.status("/livez") == 200
        assert server.status("/metrics") == 404
        scrape = httpx2.get(f"http://127.0.0.1:{server.metrics_port}/metrics").text
        assert "promptmux_http_requests_total" in scrape
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0
