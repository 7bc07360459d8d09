"""A file on its way into the store: received piece by piece into `tmp/`, hashed meanwhile, gone unless published."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import Self

from promptmux_prompts.disk import Disk
from promptmux_prompts.faults import fault
from promptmux_prompts.storing import storing


class Upload:
    """Used as a context manager, by one thread at a time; raises StorageFull and StorageFailed."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._hash = hashlib.sha256()
        self._spent = False
        self.size = 0
        """Bytes received so far."""
        with storing():
            self._file, self._place = disk.create("tmp")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self._spent:
                with suppress(OSError):  # recovery clears it away as well
                    self._disk.unlink(self._place)
        finally:
            self._disk.close(self._file)

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes received so far."""
        return self._hash.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Append what came in."""
        with storing():
            self._disk.write(self._file, chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    def read(self) -> bytes:
        """All that was received."""
        with storing():
            return self._disk.read_back(self._file)

    def keep(self, place: str) -> None:
        """Sync the file and give it its place for good; raises OSError. A file that could not be synced is not kept."""
        if self._spent:
            raise ValueError("an upload is published once")
        self._disk.sync(self._file)
        fault("publish.blob_synced")
        self._disk.rename(self._place, place)
        self._spent = True
        fault("publish.blob_renamed")
        self._disk.sync_folder(place.rpartition("/")[0])
        fault("publish.blob_dir_synced")
