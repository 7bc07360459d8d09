"""Bodies of requests, read off the network: JSON of a modest size whole, and files piece by piece into an upload.

Owns what leaves the event loop: parsing, hashing and writing. How large a body may be is the edge's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request

from promptmux_prompts import Upload
from promptmux_server.api.json_body import decode_json
from promptmux_server.errors import ClientLeft, UnsupportedMediaType

SMALL_BODY_BYTES = 4 * 1024
"""Parsed at once: a turn of a thread would take longer than the half millisecond that this takes at most."""
PIECE_BYTES = 1 << 20
"""Of a file, before it is worth a turn of a thread."""


async def read_json(request: Request) -> Any:
    """The parsed body; raises UnsupportedMediaType, MalformedJson or ClientLeft."""
    require_type(request, "application/json")
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise _left() from error
    if len(body) <= SMALL_BODY_BYTES:
        return decode_json(body)
    return await anyio.to_thread.run_sync(decode_json, body)


def require_type(request: Request, content_type: str) -> None:
    """The request never chooses how its body is read: another type is refused."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != content_type:
        raise UnsupportedMediaType(f"Send the body as {content_type}.")


@asynccontextmanager
async def received(
    request: Request, make: Callable[[], Upload], threads: anyio.CapacityLimiter
) -> AsyncIterator[Upload]:
    """The whole body in an upload, which is gone afterwards unless it was published.

    Raises ClientLeft, BodyTooLarge, StorageFull or StorageFailed.
    """
    upload = await anyio.to_thread.run_sync(make, limiter=threads)
    try:
        pending: list[bytes] = []
        async for chunk in request.stream():
            pending.append(chunk)
            if not chunk or sum(map(len, pending)) >= PIECE_BYTES:
                await anyio.to_thread.run_sync(upload.write, b"".join(pending), limiter=threads)
                pending.clear()
        yield upload
    except ClientDisconnect as error:
        raise _left() from error
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(upload.__exit__, None, None, None)


def _left() -> ClientLeft:
    return ClientLeft("The client left while sending.")
