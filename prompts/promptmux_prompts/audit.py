"""The store's audit log: one line of JSON for every change, appended and synced before the change is acknowledged.

Each line holds the HEAD that the change left behind, so that a HEAD that was damaged can be written again from here.
Knows nothing of why a change was made.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

from promptmux_prompts.disk import Disk
from promptmux_prompts.errors import BlobCorrupt
from promptmux_prompts.records import Head, now
from promptmux_prompts.strict_json import canonical

LOG = "log"
FILE = f"{LOG}/audit.jsonl"


class Audit:
    """Appends from any number of threads and processes; raises OSError."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def append(self, *, action: str, author: str, head: Head, sha256: str | None) -> None:
        """Write one line durably, or none; `sha256` is the digest of the version that the change was about."""
        line = {"time": now(), "action": action, "author": author, "head": json.loads(head.to_json()), "sha256": sha256}
        data = canonical(line).encode() + b"\n"
        file = self._disk.open_log(FILE)
        try:
            with self._disk.lock_open(file):
                self._append(file, data)
        finally:
            self._disk.close(file)

    def _append(self, file: int, data: bytes) -> None:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # somebody died in the middle of a line
            data = b"\n" + data
        self._disk.sync_folder(LOG)  # the file may be new, or made by somebody who died
        try:
            self._disk.write(file, data)
            self._disk.sync(file)
        except Exception:
            with suppress(OSError):
                self._disk.truncate(file, size)
            raise

    def last_head(self, name: str) -> Head | None:
        """What the log says that a name stands for, if it says anything that can be read."""
        last: Head | None = None
        try:
            with self._disk.open(FILE) as file, open(file, "rb", closefd=False) as lines:
                for line in lines:
                    last = _head_of(line, name) or last
        except FileNotFoundError:
            return None
        return last


def _head_of(line: bytes, name: str) -> Head | None:
    """A torn or foreign line says nothing."""
    try:
        entry: Any = json.loads(line)
        head = Head.from_json(canonical(entry["head"]).encode())
    except (ValueError, KeyError, TypeError, BlobCorrupt):
        return None
    return head if head.name == name else None
