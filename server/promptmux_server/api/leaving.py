"""Work that ends when the client leaves. An `async def` route alone is not cancelled then."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from starlette.types import Receive

from promptmux_server.errors import ClientLeft

Result = TypeVar("Result")


async def unless_client_leaves(receive: Receive, work: Callable[[], Awaitable[Result]]) -> Result:
    """What `work` returns; if the client disconnects first, it is cancelled and ClientLeft raised.

    To be used once the body is read: what else comes in is dropped.
    """
    results: list[Result] = []
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        results.append(await work())
        group.cancel_scope.cancel()
    if not results:
        raise ClientLeft("The client left before the answer was ready.")
    return results[0]
