"""A real engine on the tiny backbone with its registry behind a real socket, and how to publish to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

import tiny
from api.live_server import live_server
from promptmux_prompts import Prompt, write_prompt
from promptmux_server.api.app import Application, build_app
from promptmux_server.api.keys import Keys
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.options import EngineOptions
from promptmux_server.settings import Settings

OCTETS = "application/octet-stream"
OPTIONS = EngineOptions(queue_size=2048, queue_per_task=2048, queue_per_key=2048)
SETTINGS = Settings(queue_size=2048, queue_per_task=2048, queue_per_key=2048)


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    engine: Engine
    application: Application
    client: httpx2.Client
    port: int
    root: Path
    """Of its registry on disk."""

    def put(self, name: str, content: Prompt | bytes, **headers: str) -> httpx2.Response:
        """Publish; `headers` with underscores replace those that a correct request has."""
        return put(self.client, name, content, **headers)

    def ask(self, task: str, text: str = "the dog") -> Any:
        """The only answer of a call."""
        return self.client.post("/v1/predict", json={"task": task, "text": text}).json()["answers"][0]

    def files(self, folder: str) -> list[str]:
        return sorted(path.name for path in (self.root / folder).iterdir())


def put(client: httpx2.Client, name: str, content: Prompt | bytes, **headers: str) -> httpx2.Response:
    data = content if isinstance(content, bytes) else write_prompt(content)
    right = {"content_type": OCTETS, "x_content_sha256": hashlib.sha256(data).hexdigest()}
    sent = {key.replace("_", "-"): value for key, value in (right | headers).items() if value}
    return client.put(f"/v1/prompts/{name}", content=data, headers=sent)


@contextmanager
def serving(
    folder: Path,
    *seeds: Prompt,
    options: EngineOptions = OPTIONS,
    settings: Settings = SETTINGS,
    keys: Keys | None = None,
) -> Iterator[Served]:
    """Serve a registry in the folder `registry` there; what it holds already is served too."""
    tiny.write(folder, *seeds)
    engine = tiny.engine(folder, options)
    engine.start()
    try:
        application = build_app(engine, settings, "tiny", keys)
        with (
            live_server(application.asgi) as port,
            httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client,
        ):
            yield Served(engine, application, client, port, folder / "registry")
    finally:
        engine.stop(2.0)


def small(name: str = "any", seed: int = 0, **fields: Any) -> Prompt:
    """A prompt whose greedy answers are short and take no picture."""
    decoding = {"method": "greedy", "max_length": 4}
    return tiny.prompt(name, seed=seed, image_size=None, scale=3.0, **{"decoding": decoding, **fields})


def code(response: httpx2.Response) -> tuple[int, str]:
    """Status and error code; every error has the one shape."""
    body = response.json()
    assert body["status"] == response.status_code
    assert body["error"]["request_id"] == response.headers["x-request-id"]
    assert len(response.content) <= 4096
    return response.status_code, body["error"]["code"]
