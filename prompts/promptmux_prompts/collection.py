"""Garbage collection: versions beyond those that are kept, and files that no version needs.

It may run beside any number of publishers: a file that somebody publishes meanwhile is another file of the same name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from promptmux_prompts.audit import Audit
from promptmux_prompts.blobs import Blobs
from promptmux_prompts.disk import Disk
from promptmux_prompts.errors import BlobCorrupt
from promptmux_prompts.faults import fault
from promptmux_prompts.locks import Locks
from promptmux_prompts.recovery import clear_unfinished
from promptmux_prompts.refs import Refs


@dataclass(frozen=True)
class Collected:
    """What was removed."""

    versions: int = 0
    blobs: int = 0
    bytes: int = 0
    """Of the blobs."""
    cleared: int = 0
    """Unfinished files of dead processes."""


class Collector:
    """Removes what nobody can reach; raises OSError."""

    def __init__(self, disk: Disk, refs: Refs, blobs: Blobs, audit: Audit, locks: Locks, *, keep_versions: int) -> None:
        self._disk, self._refs, self._blobs, self._audit, self._locks = disk, refs, blobs, audit, locks
        self._keep_versions = keep_versions

    def collect(self, *, before: float) -> Collected:
        """`before`: younger files stay, in seconds since the epoch."""
        cleared = clear_unfinished(self._disk, before=before)
        old = {sha256: status for sha256, status in self._blobs.found().items() if status.st_mtime <= before}
        with self._locks.alone():
            pass  # whoever was publishing one of these files has written its version by now, or is dead
        versions, needed = 0, set[str]()
        for name in self._refs.names():
            versions += self._trim(name)
            known = self._files_of(name)
            if known is None:
                return Collected(versions=versions, cleared=cleared)
            needed |= known
        blobs, size = self._remove({sha256: status for sha256, status in old.items() if sha256 not in needed})
        return Collected(versions, blobs, size, cleared)

    def _trim(self, name: str) -> int:
        """Remove a name's versions that are not kept, and records that a publisher left unfinished."""
        if not self._doomed(name):
            return 0
        with self._locks.changing(), self._refs.lock(name):
            doomed = self._doomed(name)
            for number in doomed:
                fault("gc.before_unlink")
                self._refs.remove(name, number)
            self._refs.settle(name)
        fault("gc.versions_removed")
        return len(doomed)

    def _doomed(self, name: str) -> list[int]:
        try:
            head = self._refs.head(name)
        except (BlobCorrupt, OSError):  # recovery may need any of them
            return []
        numbers = self._refs.versions(name)
        if head is None:
            return [] if numbers and self._audit.last_head(name) is not None else numbers
        whole = [number for number in numbers if head.has(number) and not self._is_garbled(name, number)]
        kept = {*whole[-self._keep_versions :], head.version}
        return [number for number in numbers if head.deleted or number not in kept]

    def _is_garbled(self, name: str, number: int) -> bool:
        try:
            self._refs.record(name, number)
        except BlobCorrupt:
            return True
        except OSError:
            return False
        return False

    def _files_of(self, name: str) -> set[str] | None:
        """The files that a name's versions need; None if that cannot be known."""
        try:
            records = [self._refs.record(name, number) for number in self._refs.versions(name)]
        except (BlobCorrupt, OSError):
            return None
        return {record.file_sha256 for record in records if record}

    def _remove(self, unneeded: dict[str, os.stat_result]) -> tuple[int, int]:
        """Remove files that are still the ones that were found; (how many, bytes)."""
        removed, size = 0, 0
        if not unneeded:
            return removed, size
        with self._locks.alone():
            for sha256, found in unneeded.items():
                if self._blobs.is_still(sha256, found):
                    fault("gc.before_unlink")
                    self._blobs.remove(sha256)
                    removed, size = removed + 1, size + found.st_size
            self._blobs.settle()
        return removed, size
