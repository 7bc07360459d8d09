"""The stored files, each named by the sha256 of its bytes. Knows nothing of names and versions beyond their records."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress

from promptmux_prompts.disk import Disk
from promptmux_prompts.errors import BlobCorrupt
from promptmux_prompts.records import VersionRecord

BLOBS, QUARANTINE = "blobs", "quarantine"
SUFFIX = ".safetensors"
_PIECE_BYTES = 1 << 20


class Blobs:
    """The files of one store; raises OSError."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    @staticmethod
    def place(file_sha256: str) -> str:
        return f"{BLOBS}/{file_sha256}{SUFFIX}"

    def read(self, record: VersionRecord) -> bytes:
        """A whole file; raises BlobCorrupt if it is not what was written."""
        data = self._disk.read(self.place(record.file_sha256), limit=record.bytes)
        if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.file_sha256:
            raise BlobCorrupt("the stored file is not what was published; publish the prompt again")
        return data

    def check(self, record: VersionRecord) -> None:
        """As `read`, without holding the file in memory."""
        sha, size = hashlib.sha256(), 0
        with self._disk.open(self.place(record.file_sha256)) as file:
            while size <= record.bytes and (piece := os.read(file, _PIECE_BYTES)):
                sha.update(piece)
                size += len(piece)
        if size != record.bytes or sha.hexdigest() != record.file_sha256:
            raise BlobCorrupt("the stored file is not what was published; publish the prompt again")

    def set_aside(self, record: VersionRecord) -> None:
        """Move a damaged file out of the way, for somebody to look at."""
        name = f"{record.file_sha256}{SUFFIX}"
        with suppress(FileNotFoundError):
            self._disk.rename(f"{BLOBS}/{name}", f"{QUARANTINE}/{name}")
            self._disk.sync_folder(BLOBS)

    def found(self) -> dict[str, os.stat_result]:
        """Every stored file by the sha256 it is named after."""
        files = {}
        for name in self._disk.names(BLOBS):
            with suppress(FileNotFoundError):
                files[name.removesuffix(SUFFIX)] = self._disk.status(f"{BLOBS}/{name}")
        return files

    def is_still(self, file_sha256: str, found: os.stat_result) -> bool:
        """Whether nobody has put another file, of the same bytes, into a found one's place."""
        try:
            now = self._disk.status(self.place(file_sha256))
        except FileNotFoundError:
            return False
        return (now.st_ino, now.st_ctime_ns) == (found.st_ino, found.st_ctime_ns)

    def remove(self, file_sha256: str) -> None:
        self._disk.unlink(self.place(file_sha256))

    def settle(self) -> None:
        """Make removals durable."""
        self._disk.sync_folder(BLOBS)
