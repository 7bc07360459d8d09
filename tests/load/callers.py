"""Clients by the hundred on one event loop: bare HTTP, so that they cost the machine less than the server does.

`crowd` runs them in a process of their own: in the server's they would take the interpreter from it.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

PATIENCE_S = 30.0


@dataclass(frozen=True)
class Reply:
    """What a client heard, and after how long; status 0 = nothing."""

    status: int
    code: str
    """Of the error; "ok" for an answer."""
    retry_after: str | None
    sent: dict[str, Any]
    seconds: float
    body: dict[str, Any]
    ended: float
    """Seconds: on `time.monotonic`'s scale, and of a crowd's reply since the crowd began."""


def predict(body: dict[str, Any]) -> bytes:
    """The bytes of a whole request."""
    payload = json.dumps(body).encode()
    head = "POST /v1/predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()


async def call(port: int, data: bytes, sent: dict[str, Any] | None = None) -> Reply:
    """Send a request on a connection of its own and hear the answer to its end."""
    started = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        heard = await asyncio.wait_for(reader.read(), PATIENCE_S)
    finally:
        writer.close()
        await writer.wait_closed()
    ended = time.monotonic()
    head, _, payload = heard.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    body = json.loads(payload)
    code = body["error"]["code"] if "error" in body else "ok"
    return Reply(int(lines[0].split()[1]), code, headers.get("retry-after"), sent or {}, ended - started, body, ended)


async def closed_loop(
    port: int, bodies: Sequence[dict[str, Any]], seconds: float, seed: int, clients: int
) -> list[Reply]:
    """So many clients, each of which asks again as soon as it was answered."""
    chance, until = random.Random(seed), time.monotonic() + seconds
    replies: list[Reply] = []

    async def client() -> None:
        while time.monotonic() < until:
            sent = chance.choice(bodies)
            replies.append(await call(port, predict(sent), sent))

    await asyncio.gather(*(client() for _ in range(clients)))
    return replies


async def open_loop(port: int, bodies: Sequence[dict[str, Any]], seconds: float, seed: int, rate: float) -> list[Reply]:
    """Poisson arrivals at `rate` a second, whatever becomes of those before."""
    chance = random.Random(seed)
    calls: list[asyncio.Task[Reply]] = []
    start = time.monotonic()
    due = chance.expovariate(rate)
    while due < seconds:
        await asyncio.sleep(max(0.0, start + due - time.monotonic()))
        sent = chance.choice(bodies)
        calls.append(asyncio.create_task(call(port, predict(sent), sent)))
        due += chance.expovariate(rate)
    return await asyncio.gather(*calls)


def crowd(
    port: int,
    bodies: Sequence[dict[str, Any]],
    seconds: float,
    *,
    seed: int,
    clients: int | None = None,
    rate: float | None = None,
) -> list[Reply]:
    """The replies to a closed loop of `clients`, or else to an open one of `rate`, that ask with any of `bodies`."""
    kind = {"rate": rate} if clients is None else {"clients": clients}
    program = "from load.callers import main; main()"
    told = json.dumps({"port": port, "bodies": bodies, "seconds": seconds, "seed": seed, **kind})
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=told,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=seconds + 2 * PATIENCE_S,
        check=True,
    )
    return [Reply(**fields) for fields in json.loads(done.stdout)]


def main() -> None:
    """`crowd`'s other process."""
    told = json.loads(sys.stdin.read())
    began = time.monotonic()
    replies = asyncio.run(closed_loop(**told) if "clients" in told else open_loop(**told))
    replies = [replace(reply, ended=reply.ended - began) for reply in replies]
    print(json.dumps([asdict(reply) for reply in replies]))


async def leave(port: int, data: bytes, after_s: float, how: Literal["RST", "FIN"]) -> None:
    """Send these bytes, perhaps not all of a request, and cut the connection."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await asyncio.sleep(after_s)
    if how == "RST":
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()
        await writer.wait_closed()
