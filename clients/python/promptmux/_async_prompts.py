"""`AsyncClient.prompts`: the same methods as `Client.prompts`, for code that awaits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2

from promptmux import _prompt_wire as wire
from promptmux._errors import APIStatusError, VersionMismatch
from promptmux._prompt_models import PromptVersion
from promptmux._upload import FileSource, Progress, Upload
from promptmux._wire import Call

Versions = list[PromptVersion]
"""The class below has a method called `list`."""


class AsyncPrompts:
    """The prompts of one server. Changing them and reading their files needs a key of scope `admin`."""

    def __init__(self, send: Callable[[Call], Awaitable[httpx2.Response]]) -> None:
        self._send = send

    async def push(
        self,
        name: str,
        source: FileSource,
        *,
        if_version: int | None = None,
        create_only: bool = False,
        progress: Progress | None = None,
    ) -> PromptVersion:
        """Publish a prompt file (a path or bytes) as the next version of a name; once it returns, requests get it.

        Pushing what the name stands for already gives that version, so a push may be repeated. `if_version` publishes
        only on top of that version, `create_only` only a name that does not exist: else VersionMismatch. CanaryFailed
        says that the prompt does not answer here as it did where it was made. `progress` is told bytes sent and in all.
        """
        upload = await asyncio.to_thread(Upload.of, source, progress)  # reads and hashes
        call = wire.push_call(name, upload, if_version=if_version, create_only=create_only)
        try:
            return wire.read_version(await self._send(call))
        except VersionMismatch as refusal:
            # An earlier try of ours whose answer was lost may be what moved it.
            try:
                current = await self.get(name)
            except APIStatusError:
                raise refusal from None
            if current.file_sha256 == upload.sha256 and current.version > (if_version or 0):
                return current
            raise

    async def pull(self, name: str, version: int | None = None) -> bytes:
        """The file of a version, or of the present one: any server of the same backbone accepts it."""
        if version is None:
            version = (await self.get(name)).version
        return wire.read_file(await self._send(wire.file_call(name, version)))

    async def list(self) -> AsyncIterator[PromptVersion]:
        """The present version of every prompt, by name; asked for page by page."""
        after = None
        while True:
            found, after = wire.read_prompts(await self._send(wire.list_call(after)))
            for version in found:
                yield version
            if after is None:
                return

    async def get(self, name: str) -> PromptVersion:
        """The present version, with its manifest."""
        return wire.read_version(await self._send(wire.get_call(name)))

    async def versions(self, name: str) -> Versions:
        """Every version that is kept, newest first."""
        return wire.read_versions(await self._send(wire.versions_call(name)))

    async def rollback(self, name: str, to: int | None = None, *, if_version: int | None = None) -> PromptVersion:
        """Let the name stand for an earlier version again: `to`, or the newest one that is kept below the present."""
        return wire.read_version(await self._send(wire.rollback_call(name, to=to, if_version=if_version)))

    async def pin(self, name: str) -> PromptVersion:
        """Keep the prompt on the device, whatever else is asked for."""
        return wire.read_version(await self._send(wire.pin_call(name, pinned=True)))

    async def unpin(self, name: str) -> PromptVersion:
        return wire.read_version(await self._send(wire.pin_call(name, pinned=False)))

    async def delete(self, name: str, *, if_version: int | None = None) -> None:
        """Serve the name no longer; running requests end as they began. Numbers of versions are not used again."""
        await self._send(wire.delete_call(name, if_version=if_version))
