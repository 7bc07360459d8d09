"""The routes of published prompts: publish, look at, fetch, roll back, pin and delete them.

Owns who may wait where: what touches the disk or the model runs on threads, a bounded number of them. What a change
means is the engine's `PromptsPort`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from promptmux_prompts import Upload
from promptmux_prompts.faults import fault
from promptmux_server.api.body import read_json, received, require_type
from promptmux_server.api.conditions import announced_sha256, expected_version, new_name, page, version_number
from promptmux_server.api.documents import answers, takes
from promptmux_server.api.errors import as_promptmux_error
from promptmux_server.api.lifecycle import Lifecycle
from promptmux_server.api.metrics import Metrics
from promptmux_server.api.prompt_documents import (
    CREATES,
    DELETES,
    SENDS_FILE,
    TAKES_FILE,
    DescribedVersion,
    PromptPage,
    VersionList,
    etag,
    version_document,
)
from promptmux_server.api.schemas import RollbackRequest, parse_rollback
from promptmux_server.engine.publications import Change, PromptsPort, PromptVersion
from promptmux_server.errors import Draining

UPLOADS = 16
"""Files that are received at one time; others wait unread."""
WRITERS = 4
"""Threads that write what is received."""
CHANGES = 4
"""Changes at one time: each may hold a whole file in memory and wait for the model or the disk."""
READS = 4
"""Answers at one time that are read from the disk."""

FILE_TYPE = "application/octet-stream"
LOCAL = "local"
"""The author where no key says who asks."""

Result = TypeVar("Result")


class Prompts:
    """What the routes share."""

    def __init__(self, prompts: PromptsPort, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self.prompts, self._lifecycle, self._metrics = prompts, lifecycle, metrics
        self._uploads, self._writers, self._changes, self._reads = map(
            anyio.CapacityLimiter, (UPLOADS, WRITERS, CHANGES, READS)
        )

    async def publish(self, request: Request, name: str) -> Response:
        """Receive a file, and answer once every later request sees it."""
        try:
            change = await self._published(request, name)
        except Exception as error:
            self._metrics.published(as_promptmux_error(error).code)
            raise
        self._metrics.published("ok" if change.changed else "unchanged")
        return _described(change.version, 201 if change.changed else 200)

    async def _published(self, request: Request, name: str) -> Change:
        self._refuse_while_draining()
        require_type(request, FILE_TYPE)
        name, sha256, expected = new_name(name), announced_sha256(request), expected_version(request)

        def publish(upload: Upload) -> Change:
            change = self.prompts.publish(name, upload, sha256=sha256, author=author_of(request), expected=expected)
            fault("respond.before")
            return change

        async with self._uploads, received(request, self.prompts.upload, self._writers) as upload:
            return await anyio.to_thread.run_sync(publish, upload, limiter=self._changes)

    async def change(self, do: Callable[[], Result]) -> Result:
        """Do something to the registry."""
        self._refuse_while_draining()
        return await anyio.to_thread.run_sync(do, limiter=self._changes)

    async def read(self, do: Callable[[], Result]) -> Result:
        """Look something up that may have to be read from the disk."""
        return await anyio.to_thread.run_sync(do, limiter=self._reads)

    def _refuse_while_draining(self) -> None:
        if self._lifecycle.draining:
            raise Draining("The server is shutting down. Send this to another replica.", retry_after_s=5)


def author_of(request: Request) -> str:
    """Name of the key that asks."""
    return request.scope.get("promptmux.key") or LOCAL


def _described(version: PromptVersion, status: int = 200) -> Response:
    return JSONResponse(version_document(version), status, etag(version))


def add_prompts(app: FastAPI, desk: Prompts) -> None:
    """Register the routes."""
    prompts = desk.prompts
    _add_looking(app, desk)

    @app.put(
        "/v1/prompts/{name}",
        summary="Publish a prompt file; every later request gets it",
        responses=CREATES,
        openapi_extra=TAKES_FILE,
    )
    async def publish(name: str, request: Request) -> Response:
        return await desk.publish(request, name)

    @app.delete("/v1/prompts/{name}", summary="Let a name stand for nothing", status_code=204, responses=DELETES)
    async def delete(name: str, request: Request) -> Response:
        author, expected = author_of(request), expected_version(request)
        await desk.change(lambda: prompts.delete(name, author=author, expected=expected))
        return Response(status_code=204)

    @app.post(
        "/v1/prompts/{name}/rollback",
        summary="Let a name stand for an earlier version",
        responses=answers(DescribedVersion),
        openapi_extra=takes(RollbackRequest),
    )
    async def rollback(name: str, request: Request) -> Response:
        author, expected = author_of(request), expected_version(request)
        to = parse_rollback(await read_json(request)).version
        change = await desk.change(lambda: prompts.rollback(name, to=to, author=author, expected=expected))
        return _described(change.version)

    @app.post("/v1/prompts/{name}/pin", summary="Keep on the device", responses=answers(DescribedVersion))
    async def pin(name: str, request: Request) -> Response:
        return _described(await desk.change(lambda: prompts.set_pinned(name, True, author=author_of(request))))

    @app.post("/v1/prompts/{name}/unpin", summary="Let go from the device", responses=answers(DescribedVersion))
    async def unpin(name: str, request: Request) -> Response:
        return _described(await desk.change(lambda: prompts.set_pinned(name, False, author=author_of(request))))


def _add_looking(app: FastAPI, desk: Prompts) -> None:
    prompts = desk.prompts

    @app.get("/v1/prompts", summary="What names stand for", responses=answers(PromptPage))
    async def listing(request: Request) -> Response:
        after, limit = page(request)
        found, following = prompts.page(after, limit)
        return JSONResponse({"prompts": [version_document(version) for version in found], "next": following})

    @app.get("/v1/prompts/{name}", summary="What a name stands for", responses=answers(DescribedVersion))
    async def current(name: str) -> Response:
        return _described(await desk.read(lambda: prompts.current(name)))

    @app.get("/v1/prompts/{name}/versions", summary="What a name keeps", responses=answers(VersionList))
    async def versions(name: str) -> Response:
        found = await desk.read(lambda: prompts.versions(name))
        standing = next((version.record.version for version in found if version.current), None)
        return JSONResponse(
            {"name": name, "current": standing, "versions": [version_document(version) for version in found]}
        )

    @app.get(
        "/v1/prompts/{name}/versions/{version}/file",
        summary="A version's file",
        response_class=Response,
        responses=SENDS_FILE,
    )
    async def file(name: str, version: str) -> Response:
        number = version_number(version)
        record, data = await desk.read(lambda: prompts.file(name, number))
        headers = {
            "X-Content-SHA256": record.file_sha256,
            "ETag": f'"{record.version}"',
            "Content-Disposition": f'attachment; filename="{record.name}-{record.version}.safetensors"',
        }
        return Response(data, headers=headers, media_type=FILE_TYPE)
