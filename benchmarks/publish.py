"""Publication of prompts beside traffic: how long one takes, when it is seen, what other requests notice of it.

Prompts are of 64 positions on both sides, in bfloat16, without canary; texts are asked, of tasks that are replaced
meanwhile. Everything goes through the client and a server in a process of its own.

- `publish_ms`: from the call of `push` until it returns. Target 150 on OFA-base.
- `visible_ms`: from then until `GET /v1/prompts/{name}` has said so. Target 50. `stale` counts requests sent after a
  publication and answered by an older version. Target 0.
- `of_quiet_p99`: the 99th percentile of waits at 0.7 of the capacity during swaps, of that without. Target 2.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch

from engines import PROMPT_LENGTH, arguments, report
from load import percentile, poisson
from ofa_base_picture import placeholder_tokenizer
from promptmux import Client
from promptmux_prompts import Manifest, Prompt, write_prompt
from promptmux_server.backbone.sizes import OFA_SIZES
from promptmux_server.backbone.weights import LoadedBackbone, load_backbone
from promptmux_server.backbone.weights.own_format import write_backbone
from promptmux_server.backbone.weights.random_init import random_backbone
from promptmux_server.pocket import WEIGHTS
from serving import serving

TASKS = 8
LOAD = 0.7
"""Of the capacity."""
TOKENS = 16
IN_FLIGHT = 32
"""More than a batch holds, to measure the capacity."""
CAPACITY_S = 10.0
DEADLINE_MS = 60_000


def on_disk(name: str, folder: Path) -> tuple[str, LoadedBackbone]:
    """What `--backbone` is to be, and the backbone; an OFA size gets random weights."""
    if name == "pocket":
        return name, load_backbone(WEIGHTS)
    config = OFA_SIZES[name.removeprefix("ofa-")]
    tokenizer, directory = folder / "tokenizer", folder / "backbone"
    tokenizer.mkdir()
    placeholder_tokenizer(config).save(tokenizer)
    write_backbone(directory, LoadedBackbone(config, random_backbone(config, seed=0, dtype=torch.float32), tokenizer))
    return str(directory), load_backbone(directory)


class Publisher:
    """Publishes one version after another, for each task in turn, and knows what it has published."""

    def __init__(self, client: Client, backbone: LoadedBackbone) -> None:
        config, draw = backbone.config, torch.Generator().manual_seed(0)
        layers = (config.encoder_layers, config.encoder_layers, config.decoder_layers, config.decoder_layers)
        shapes = [(count, config.heads, PROMPT_LENGTH, config.head_dim) for count in layers]
        self._sides = [(torch.randn(shape, generator=draw) * 0.02).to(torch.bfloat16) for shape in shapes]
        self._client, self._backbone, self._count = client, backbone, 0
        self.published = {f"t{task}": 0 for task in range(TASKS)}
        self.publish_ms: list[float] = []
        self.visible_ms: list[float] = []

    def next_file(self) -> tuple[str, bytes]:
        """Of no version before: the same numbers at other positions."""
        name, config = f"t{self._count % TASKS}", self._backbone.config
        manifest = Manifest(
            name=name,
            kind="text",
            backbone_name=config.name,
            fingerprint=self._backbone.fingerprint,
            encoder_length=PROMPT_LENGTH,
            decoder_length=PROMPT_LENGTH,
            instruction=" {text}",
            image=None,
            decoding={"beam_size": 1, "min_length": TOKENS, "max_length": TOKENS},
        )
        sides = [side.roll(self._count) for side in self._sides]
        self._count += 1
        return name, write_prompt(Prompt.build(manifest, *sides))

    def publish(self, count: int, seconds: float = 0.0) -> None:
        """So many versions, evenly over a time."""
        self.publish_ms, self.visible_ms = [], []
        begun = time.monotonic()
        for number in range(count):
            name, data = self.next_file()
            time.sleep(max(0.0, begun + seconds * number / count - time.monotonic()))
            started = time.perf_counter()
            version = self._client.prompts.push(name, data).version
            ended = time.perf_counter()
            self.published[name] = version
            while self._client.prompts.get(name).version < version:
                pass
            self.publish_ms.append(1000 * (ended - started))
            self.visible_ms.append(1000 * (time.perf_counter() - ended))


class Traffic:
    """Requests of all tasks in turns."""

    def __init__(self, address: str, publisher: Publisher) -> None:
        self._url, self._publisher, self._asked = f"{address}/v1/predict", publisher, 0
        self.stale = 0

    async def _ask(self, http: httpx2.AsyncClient) -> None:
        task = f"t{self._asked % TASKS}"
        self._asked += 1
        item = {"task": task, "text": f"w{self._asked}"}
        newest = self._publisher.published[task]
        body = json.dumps({"items": [item], "deadline_ms": DEADLINE_MS}).encode()
        response = await http.post(self._url, content=body, headers={"content-type": "application/json"})
        answer: dict[str, Any] = response.raise_for_status().json()["answers"][0]
        self.stale += answer["prompt"]["version"] < newest

    async def capacity(self) -> float:
        """Answers a second while always `IN_FLIGHT` requests are on their way."""
        begun, answered = time.monotonic(), 0

        async def ask_on(http: httpx2.AsyncClient) -> None:
            nonlocal answered
            while time.monotonic() < begun + CAPACITY_S:
                await self._ask(http)
                answered += 1

        async with _http() as http:
            await asyncio.gather(*(ask_on(http) for _ in range(IN_FLIGHT)))
        return answered / (time.monotonic() - begun)

    async def waits_ms(self, at_s: Sequence[float]) -> list[float]:
        """Milliseconds from when each request was due, so many seconds from now, until it was answered."""
        begun = time.monotonic()

        async def wait(http: httpx2.AsyncClient, due: float) -> float:
            await asyncio.sleep(due - time.monotonic())
            await self._ask(http)
            return 1000 * (time.monotonic() - due)

        async with _http() as http:
            return await asyncio.gather(*(wait(http, begun + seconds) for seconds in at_s))


def _http() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(timeout=None, limits=httpx2.Limits(max_connections=None), trust_env=False)


def main() -> None:
    options = arguments(__doc__, seconds=60, swaps=100, publications=24)
    with tempfile.TemporaryDirectory() as folder:
        place, backbone = on_disk(options.backbone, Path(folder))
        settings = {"queue_size": 4096, "queue_per_key": 4096, "queue_per_task": 4096, "max_deadline_ms": DEADLINE_MS}
        with serving(Path(folder, "state"), backbone=place, **settings) as served, Client(served.address) as client:
            publisher = Publisher(client, backbone)
            publisher.publish(TASKS)
            traffic = Traffic(served.address, publisher)
            asyncio.run(traffic.capacity())  # warms up
            publisher.publish(options.publications)
            alone_ms, visible_ms = publisher.publish_ms, publisher.visible_ms
            full = asyncio.run(traffic.capacity())
            arrivals = poisson(LOAD * full, round(LOAD * full * options.seconds), seed=0)
            quiet = asyncio.run(traffic.waits_ms(arrivals))
            swaps = threading.Thread(target=publisher.publish, args=(options.swaps, arrivals[-1]))
            swaps.start()
            during = asyncio.run(traffic.waits_ms(arrivals))
            swaps.join()
        report(
            "publish",
            options.backbone,
            file_mb=len(publisher.next_file()[1]) / 1e6,
            publish_p50_ms=percentile(alone_ms, 50),
            publish_max_ms=max(alone_ms),
            visible_p50_ms=percentile(visible_ms, 50),
            visible_max_ms=max(visible_ms),
            capacity_per_s=full,
            quiet_p50_ms=percentile(quiet, 50),
            quiet_p99_ms=percentile(quiet, 99),
            during_p50_ms=percentile(during, 50),
            during_p99_ms=percentile(during, 99),
            of_quiet_p99=percentile(during, 99) / percentile(quiet, 99),
            swaps=options.swaps,
            publish_during_p50_ms=percentile(publisher.publish_ms, 50),
            publish_during_p99_ms=percentile(publisher.publish_ms, 99),
            stale=traffic.stale,
        )


if __name__ == "__main__":
    main()
