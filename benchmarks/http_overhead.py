"""Requests a second through HTTP against the same requests given to the same engine directly, at saturation.

The server is a process of its own, the sender another. Directly, pictures come decoded; through HTTP they come as
JPEG files in base64 in a JSON body, many items a call and one item a call. Target: 0.60 on pocket, 0.95 on OFA-base.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import httpx2
import numpy as np
import uvicorn
from PIL import Image

from engines import arguments, bench, report, side_by_side
from load import closed_loop
from promptmux_server.api.app import build_app
from promptmux_server.api.serving import server_config
from promptmux_server.backbone.images import ImageLimits, decode_base64_image
from promptmux_server.cli.process import configure_logging
from promptmux_server.settings import Settings

TASKS = 16
IN_FLIGHT = 64
"""Items on their way, directly and through HTTP: two batches."""
ITEMS_PER_CALL = 16
AN_HOUR_MS = 3_600_000


def jpeg(seed: int, side: int) -> str:
    """A smooth picture as a JPEG file in base64; one of pure noise would be as large as its pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue()).decode()


def serve(pipe: Connection, backbone: str, requests: int) -> None:
    """The server's process: sends its port and the items to ask for, then answers them directly whenever it is told to.

    It ends when the pipe does.
    """
    settings = Settings(
        queue_size=4096, queue_per_task=4096, default_deadline_ms=AN_HOUR_MS, max_deadline_ms=AN_HOUR_MS
    )
    with bench(backbone, TASKS) as made, made.engine(max_batch=settings.max_batch, warm_up=True) as engine:
        images = [jpeg(seed, made.side) for seed in range(requests)]
        direct = [made.request(i % TASKS, decode_base64_image(image, ImageLimits())) for i, image in enumerate(images)]
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # the log, a line a call as in earnest
        configure_logging()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(server_config(build_app(engine, settings, backbone).asgi, settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        items = [
            {"task": request.task, "text": request.text, "image": image, "decoding": request.decoding}
            for request, image in zip(direct, images, strict=True)
        ]
        pipe.send((listener.getsockname()[1], items))
        while pipe.recv():
            calls = closed_loop(engine, [replace(request) for request in direct], IN_FLIGHT)
            pipe.send([call.error for call in calls if call.error])
        server.should_exit = True
        thread.join()


async def ask(port: int, bodies: Sequence[bytes], calls: int) -> None:
    """Send every body, so many calls at a time; raises if an item was not answered."""
    limits = httpx2.Limits(max_connections=calls)
    url = f"http://127.0.0.1:{port}/v1/predict"
    async with httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
        free = asyncio.Semaphore(calls)

        async def call(body: bytes) -> None:
            async with free:
                response = await client.post(url, content=body, headers={"content-type": "application/json"})
            if errors := [
                answer["error"] for answer in response.raise_for_status().json()["answers"] if "error" in answer
            ]:
                raise RuntimeError(errors[0])

        await asyncio.gather(*map(call, bodies))


def bodies(items: Sequence[dict[str, Any]], each: int) -> list[bytes]:
    return [json.dumps({"items": items[start : start + each]}).encode() for start in range(0, len(items), each)]


def main() -> None:
    options = arguments(__doc__, rounds=3, requests=128)
    processes = multiprocessing.get_context("spawn")
    pipe, theirs = processes.Pipe()
    server = processes.Process(target=serve, args=(theirs, options.backbone, options.requests), daemon=True)
    server.start()
    theirs.close()
    port, items = pipe.recv()
    many, single = bodies(items, ITEMS_PER_CALL), bodies(items, 1)

    def directly() -> None:
        pipe.send(True)
        if errors := pipe.recv():
            raise RuntimeError(errors[0])

    ways = {
        "direct": directly,
        "many": lambda: asyncio.run(ask(port, many, IN_FLIGHT // ITEMS_PER_CALL)),
        "single": lambda: asyncio.run(ask(port, single, IN_FLIGHT)),
    }
    seconds = side_by_side(ways, options.rounds)
    pipe.send(False)
    server.join()
    report(
        "http_overhead",
        options.backbone,
        direct_requests_per_s=options.requests / seconds["direct"],
        of_direct_many_items=seconds["direct"] / seconds["many"],
        of_direct_one_item=seconds["direct"] / seconds["single"],
        items_per_call=ITEMS_PER_CALL,
        body_kb=len(many[0]) / 1000,
    )


if __name__ == "__main__":
    main()
