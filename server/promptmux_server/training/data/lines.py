"""Lines of a file in any order: an index of where each begins, made in one pass and kept beside the training's state.

The file itself is never held in memory. Knows no format.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from promptmux_server.errors import DataError
from promptmux_server.training.data.tables import Table, read_table, write_table

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
NEWLINE = ord("\n")


class LineFile:
    """A file by line number (from 0). Raises DataError if it is not there, is empty, or changes while it is read."""

    def __init__(self, path: Path, cache: Path) -> None:
        """`cache` keeps the index, for as long as neither size nor time of the file changes."""
        self.name = path.name
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: check its name and its permissions.") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._state = _state_of(self._descriptor)
        index = _index(path, self._descriptor, self._state, cache)
        self._starts: npt.NDArray[np.uint64] = index.rows
        self.sha256 = str(index.note["sha256"])
        """Of the file's bytes."""
        if len(self) == 0:
            raise DataError(f"{self.name} is empty: give it at least one sample.")

    def __len__(self) -> int:
        return max(0, len(self._starts) - 1)

    def __getitem__(self, number: int) -> bytes:
        """A line without its end."""
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        if end - start > MAX_LINE_BYTES:
            raise DataError(
                f"{self.name}, line {number + 1}: longer than {MAX_LINE_BYTES >> 20} MiB. Is it a data file?"
            )
        if _state_of(self._descriptor) != self._state:
            raise DataError(f"{self.name} was changed while it was read: start again, and leave it alone meanwhile.")
        return os.pread(self._descriptor, end - start, start).rstrip(b"\r\n")


def _state_of(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _index(path: Path, descriptor: int, state: tuple[int, int], cache: Path) -> Table:
    """Where each line begins, and the file's end; the index of an earlier time if the file is the same."""
    key = hashlib.sha256(f"{path.resolve()} {state}".encode()).hexdigest()
    kept = cache / f"lines-{key[:32]}"
    note: dict[str, Any] = {}
    return read_table(kept, "<u8") or write_table(kept, "<u8", _starts(descriptor, note), note)


def _starts(descriptor: int, note: dict[str, Any]) -> Iterator[npt.NDArray[np.uint64]]:
    yield np.zeros(1, np.uint64)
    sha, position, ended = hashlib.sha256(), 0, True
    while chunk := os.pread(descriptor, CHUNK_BYTES, position):
        sha.update(chunk)
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == NEWLINE)
        yield (ends + position + 1).astype(np.uint64)
        position += len(chunk)
        ended = chunk[-1] == NEWLINE
    if not ended:  # a last line without newline ends where the file does
        yield np.array([position], np.uint64)
    note["sha256"] = sha.hexdigest()
