"""Recovery at start: every name stands for a version whose file is whole, or is known to be damaged. It never refuses.

Owns what is verified, what a name falls back to, and the clearing of what dead processes left in `tmp/`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

from promptmux_prompts.audit import Audit
from promptmux_prompts.blobs import QUARANTINE, Blobs
from promptmux_prompts.disk import Disk
from promptmux_prompts.errors import BlobCorrupt
from promptmux_prompts.locks import Locks
from promptmux_prompts.records import Head
from promptmux_prompts.refs import TMP, Refs

READERS = 4
"""Threads that verify files: one hashes while another waits for the disk."""


@dataclass(frozen=True)
class Damage:
    """A name whose HEAD, record or file is not what was written."""

    name: str
    version: int | None
    """That the name stood for; None where the HEAD itself is lost."""
    reason: str
    fallback: int | None
    """The version it stands for now; None: it is quarantined until somebody publishes again."""


@dataclass(frozen=True)
class Recovery:
    """What was found at start."""

    damaged: tuple[Damage, ...]
    cleared: int
    """Unfinished files of dead processes, removed."""


class Recoverer:
    """Looks at every name once; any number of processes may do so at once."""

    def __init__(self, disk: Disk, refs: Refs, blobs: Blobs, audit: Audit, locks: Locks) -> None:
        self._disk, self._refs, self._blobs, self._audit, self._locks = disk, refs, blobs, audit, locks

    def recover(self, *, fall_back: bool, before: float) -> Recovery:
        """`before`: unfinished files changed later, in seconds since the epoch, are left alone."""
        cleared = clear_unfinished(self._disk, before=before)
        names = self._refs.names()
        with ThreadPoolExecutor(READERS) as readers:
            problems = list(readers.map(self._problem, names))
        found = [self._repair(name, problem, fall_back) for name, problem in zip(names, problems, strict=True)]
        return Recovery(tuple(damage for damage in found if damage), cleared)

    def _problem(self, name: str) -> str | None:
        """Why what a name stands for cannot be served."""
        try:
            head = self._refs.head(name)
            if head is None:
                # Without a line in the log, this is a first publication that never finished.
                lost = bool(self._refs.versions(name)) and self._audit.last_head(name) is not None
                return "its HEAD is missing" if lost else None
            if head.deleted:
                return None
            record = self._refs.record(name, head.version)
            if record is None:
                return "the version's record is missing"
            self._blobs.check(record)
        except FileNotFoundError:
            return "the version's file is missing"
        except OSError:
            return "it cannot be read"
        except BlobCorrupt as error:
            return str(error)
        return None

    def _repair(self, name: str, problem: str | None, fall_back: bool) -> Damage | None:
        """Let a damaged name stand for the newest whole version that is no newer than it stood for."""
        if problem is None:
            return None
        try:
            with self._locks.alone():
                if self._problem(name) is None:  # published again meanwhile
                    return None
                return self._fall_back(name, problem, fall_back)
        except (OSError, BlobCorrupt):
            return Damage(name, None, problem, None)

    def _fall_back(self, name: str, problem: str, allowed: bool) -> Damage | None:
        kept = self._refs.versions(name)
        try:
            stood = self._refs.head(name)
        except BlobCorrupt:
            stood = None
        head = stood or self._audit.last_head(name) or _newest(name, kept)
        if head is None:
            return Damage(name, None, problem, None)
        candidates = [] if head.deleted else [n for n in reversed(kept) if head.has(n) and n <= head.version]
        whole = next((number for number in candidates if self._is_whole(name, number)), None)
        good = whole if allowed or whole == head.version else None
        after = head if good is None else replace(head, version=good)
        if after != stood:
            self._refs.move_head(after, what="recover", then=lambda: self._log(after))
        return None if after.deleted else Damage(name, stood.version if stood else None, problem, good)

    def _log(self, head: Head) -> None:
        self._audit.append(action="recover", author="local", head=head, sha256=None)

    def _is_whole(self, name: str, version: int) -> bool:
        """Whether a version can be served; what is damaged is moved out of the way, what cannot be read stays."""
        try:
            record = self._refs.record(name, version)
        except BlobCorrupt:
            self._refs.set_aside(name, version, QUARANTINE)
            return False
        except OSError:
            return False
        if record is None:
            return False
        try:
            self._blobs.check(record)
        except BlobCorrupt:
            self._blobs.set_aside(record)
            return False
        except OSError:
            return False
        return True


def _newest(name: str, kept: list[int]) -> Head | None:
    """The best guess where neither HEAD nor log says anything."""
    if not kept:
        return None
    return Head(name, kept[-1], kept[-1], kept[0], deleted=False, pinned=False, seed=None)


def clear_unfinished(disk: Disk, *, before: float) -> int:
    """Remove files of `tmp/` that are no younger and that nobody alive is writing; returns how many."""
    cleared = 0
    for name in disk.names(TMP):
        place = f"{TMP}/{name}"
        with suppress(OSError):  # gone meanwhile, or nothing that we made
            if disk.status(place).st_mtime <= before:
                cleared += disk.clear(place)
    return cleared
