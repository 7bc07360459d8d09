"""The nouns of publication and its door as a Protocol, for whoever offers it to callers.

Owns what a change answers. Knows nothing of HTTP or of how a change is made durable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from promptmux_prompts import Expected, Manifest, Upload, VersionRecord


@dataclass(frozen=True, kw_only=True)
class PromptVersion:
    """One version of one name, as it is at this moment."""

    record: VersionRecord
    current: bool
    """The name stands for it."""
    pinned: bool
    """The name's prompt is to stay on the device."""
    manifest: Manifest | None = None
    """Of versions that are shown alone."""


@dataclass(frozen=True)
class Change:
    """What a change came to."""

    version: PromptVersion
    changed: bool
    """False: the name stood for this already."""


class PromptsPort(Protocol):
    """Published prompts as the API sees them. Every method may be called from any thread, and may wait for the disk.

    `expected` is what the name must stand for before a change: a version, ABSENT, or None for anything. All raise
    members of the server's error tree, PromptFileError or StoreError.
    """

    @property
    def max_bytes(self) -> int:
        """Size of the largest file that could be published."""

    def upload(self) -> Upload:
        """A new file to receive a prompt into; a context manager."""

    def publish(self, name: str, upload: Upload, *, sha256: str, author: str, expected: Expected) -> Change:
        """Check and rehearse a received file whose bytes have this digest, and let the name stand for it.

        When this returns, the version would survive a power cut and every request from now on gets it or a newer one.
        """

    def rollback(self, name: str, *, to: int | None, author: str, expected: Expected) -> Change:
        """Let a name stand for a version that it keeps; None: the newest good one below that of the moment."""

    def delete(self, name: str, *, author: str, expected: Expected) -> None:
        """Let a name stand for nothing."""

    def set_pinned(self, name: str, pinned: bool, *, author: str) -> PromptVersion:
        """Keep a name's prompt on the device, or let it go."""

    def current(self, name: str) -> PromptVersion:
        """What a name stands for."""

    def page(self, after: str, limit: int) -> tuple[list[PromptVersion], str | None]:
        """Served names behind `after`, sorted, and the last of them if there are more."""

    def versions(self, name: str) -> list[PromptVersion]:
        """Those that a name keeps, newest first."""

    def file(self, name: str, version: int) -> tuple[VersionRecord, bytes]:
        """A version's whole file."""
