"""A good caller beside whatever a test does to the server: what went wrong for it, and how soon /livez answered."""

from __future__ import annotations

import threading
import time
from typing import Any, Self

import httpx2

from api.registry_server import Served

RATE_HZ = 20.0


class Steady:
    """A caller who asks one task at a steady rate, and a prober of /livez, on threads of their own."""

    def __init__(self, served: Served, task: str) -> None:
        self._served, self._task = served, task
        self.answers: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.probes_s: list[float] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._ask, self._probe)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{self._served.port}", timeout=60.0) as client:
            while not self._over.wait(1 / RATE_HZ):
                response = client.post("/v1/predict", json={"task": self._task, "text": "the dog"})
                if response.status_code == 200:
                    self.answers.append(response.json()["answers"][0])
                else:
                    self.wrong.append(response.text)

    def _probe(self) -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{self._served.port}", timeout=60.0) as client:
            while not self._over.wait(0.01):
                started = time.monotonic()
                if client.get("/livez").status_code != 200:
                    self.wrong.append("not live")
                self.probes_s.append(time.monotonic() - started)
