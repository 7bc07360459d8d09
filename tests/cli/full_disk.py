"""A disk with no room left from some change on: files opened for writing, written, synced, renamed, folders made.

Works on what Python calls, in all threads. What is there can still be read and removed. Changes go by who
asked for them, so that a test can meet one of each kind.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

NAMED_BY = 4
"""Callers of this program that name a change."""
WRITING = frozenset("wax+")


Kind = tuple[str, ...]
"""What was to be changed, and the functions of this program that asked for it, the innermost first."""


@dataclass
class FullDisk:
    """Full from the first change on that is none of `but_for`, or with `once` at that change alone."""

    but_for: frozenset[Kind]
    once: bool = False
    refused: list[Kind] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def change(self, what: str) -> None:
        kind = (what, *_callers())
        with self._lock:
            is_first = not self.refused and kind not in self.but_for
            if not is_first and (self.once or not self.refused):
                return
            self.refused.append(kind)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def take_over(self, patch: pytest.MonkeyPatch) -> None:
        """Stand between the program and its disk until the patch is undone."""
        for name in ("write", "fsync", "mkdir", "rename", "replace", "ftruncate"):
            patch.setattr(os, name, self._before(name, getattr(os, name)))
        os_open, io_open = os.open, io.open

        def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if flags & os.O_CREAT:
                self.change("create")
            return os_open(path, flags, *arguments, **options)

        def opened_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not WRITING & set(mode):
                return io_open(file, mode, *arguments, **options)
            self.change("open")
            return _Written(io_open(file, mode, *arguments, **options), self)

        patch.setattr(os, "open", opened)
        patch.setattr(io, "open", opened_file)

    def _before(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            self.change(name)
            return call(*arguments, **options)

        return changed


class _Written:
    """A file whose writes are changes."""

    def __init__(self, file: Any, disk: FullDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> int:
        self._disk.change("write")
        return int(self._file.write(data))

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _callers() -> tuple[str, ...]:
    """Functions of this program on the stack, the innermost first."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < NAMED_BY:
        if "/promptmux_" in frame.f_code.co_filename:
            found.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)
