"""A server that takes trainings into a folder of its own, in front of an engine that only pretends."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from api.fake_engine import FakeEngine
from api.live_server import live_server
from promptmux_server.api.app import Application, build_app
from promptmux_server.api.keys import Keys
from promptmux_server.jobs import FILE, JobTable
from promptmux_server.settings import Settings

CONFIG = """\
output = "runs/pets"

[task]
name = "pets"
kind = "answer"

[data]
heldout = 0.2

[[data.train]]
path = "pets.jsonl"
images = "pictures"

[steps]
steps = 500
"""


@dataclass(frozen=True)
class TrainingServer:
    """One that runs; `root` is the folder of trainings."""

    application: Application
    client: httpx2.Client
    port: int
    root: Path
    state: Path

    @property
    def table(self) -> JobTable:
        """As a worker or a command of the same machine opens it."""
        return JobTable(self.state / FILE)

    def clear(self) -> None:
        """As on the first day."""
        for folder in (self.state, self.root):
            shutil.rmtree(folder, ignore_errors=True)
        self.root.mkdir()

    def post(self, config: Any = CONFIG, *, key: str | None = None, **fields: Any) -> httpx2.Response:
        headers = {} if key is None else {"idempotency-key": key}
        return self.client.post("/v1/trainings", json={"config": config, **fields}, headers=headers)

    def into(self, output: str, **fields: Any) -> Any:
        """A training that was taken."""
        taken = self.post(CONFIG.replace("runs/pets", output), **fields)
        assert taken.status_code == 201, taken.text
        return taken.json()


@contextmanager
def taking_trainings(folder: Path, keys: Keys | None = None, **settings: Any) -> Iterator[TrainingServer]:
    root = folder / "root"
    root.mkdir(exist_ok=True)
    given = {"training_root": root, "state": folder / "state", **settings}
    application = build_app(FakeEngine(), Settings(**given), "fake", keys)
    with (
        live_server(application.asgi) as port,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0) as client,
    ):
        yield TrainingServer(application, client, port, root, given["state"])
