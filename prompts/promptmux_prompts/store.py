"""The store of published prompts: a directory that survives crashes, full disks and several writers at once.

Content-addressed blobs, immutable version records, one mutable HEAD a name, an audit log. A change is acknowledged by
returning, and by then it would survive a power cut. Knows nothing of servers, devices or how a prompt is checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

from promptmux_prompts.audit import LOG, Audit
from promptmux_prompts.blobs import BLOBS, QUARANTINE, Blobs
from promptmux_prompts.collection import Collected, Collector
from promptmux_prompts.disk import Disk
from promptmux_prompts.errors import (
    BlobCorrupt,
    InvalidName,
    NameNotFound,
    RegistryFull,
    VersionNotFound,
)
from promptmux_prompts.faults import fault
from promptmux_prompts.format import Prompt
from promptmux_prompts.locks import Locks
from promptmux_prompts.records import Expected, Head, VersionRecord, check_expected, is_name, now
from promptmux_prompts.recovery import Recoverer, Recovery
from promptmux_prompts.refs import REFS, TMP, Refs
from promptmux_prompts.storing import storing
from promptmux_prompts.upload import Upload

FOLDERS = ("", BLOBS, REFS, LOG, QUARANTINE, TMP)


def _nothing(*_: object) -> None:
    """Nobody keeps HEADs in memory."""


class Store:
    """One registry on disk; any number of threads and processes may use it at once."""

    def __init__(self, disk: Disk, *, keep_versions: int, max_names: int) -> None:
        self._disk, self._refs, self._blobs = disk, Refs(disk), Blobs(disk)
        self._audit, self._locks = Audit(disk), Locks(disk)
        self._keep_versions, self._max_names = keep_versions, max_names
        self._opened = time.time()

    @classmethod
    def open(cls, root: Path, *, keep_versions: int = 10, max_names: int = 1000, disk: Disk | None = None) -> Self:
        """Make what is missing of the layout; raises StorageFull and StorageFailed."""
        with storing():
            root.mkdir(parents=True, exist_ok=True)
            disk = Disk(root.resolve()) if disk is None else disk
            for folder in FOLDERS[1:]:
                disk.make_folder(folder)
            for folder in FOLDERS:
                disk.sync_folder(folder)
        return cls(disk, keep_versions=keep_versions, max_names=max_names)

    # -- Changes. All raise StorageFull and StorageFailed: then nothing has changed.

    def upload(self) -> Upload:
        """A new file to receive a prompt into; a context manager."""
        return Upload(self._disk)

    def publish(
        self,
        name: str,
        upload: Upload,
        prompt: Prompt,
        *,
        author: str,
        expected: Expected = None,
        seed: bool = False,
        on_head: Callable[[VersionRecord], None] = _nothing,
    ) -> VersionRecord:
        """Make a checked upload the newest version of a name, and let the name stand for it.

        `on_head` hears of it before anybody can change the name again. Content that the name stands for already makes
        no new version. Raises InvalidName, VersionMismatch and RegistryFull.
        """
        if not is_name(name):
            raise InvalidName("a name has 1 to 64 of a-z, 0-9, dot, dash and underscore, begins with a-z or 0-9, no ..")
        with storing(), self._locks.changing(), self._living(name, expected) as head:
            digest = prompt.digest if seed else head.seed if head else None
            record = self._same(head, prompt)
            if head is None or record is None:
                number = head.latest + 1 if head else 1
                record = VersionRecord(
                    name=name,
                    version=number,
                    sha256=prompt.digest,
                    file_sha256=upload.sha256,
                    bytes=upload.size,
                    encoder_length=prompt.manifest.encoder_length,
                    decoder_length=prompt.manifest.decoder_length,
                    created=now(),
                    author=author,
                )
                upload.keep(self._blobs.place(record.file_sha256))
                self._refs.write(record)
                floor = number if head is None or head.deleted else head.floor
                pinned = head is not None and head.pinned
                after = Head(name, number, number, floor, deleted=False, pinned=pinned, seed=digest)
            else:
                after = replace(head, seed=digest)
            self._move("publish", head, after, author, record)
            on_head(record)
            fault("publish.swapped")
        return record

    def rollback(
        self,
        name: str,
        *,
        author: str,
        to: int | None = None,
        expected: Expected = None,
        on_head: Callable[[VersionRecord], None] = _nothing,
    ) -> VersionRecord:
        """Let a name stand for a version it has; None: for the newest kept one below that of the moment.

        Raises NameNotFound, VersionNotFound, VersionMismatch, and BlobCorrupt for a version that is damaged.
        """
        with storing(), self._locks.changing(), self._existing(name, expected) as head:
            if to is None:
                record = self._before(head)
            else:
                record = self.record(name, to)
                self._check(record)
            self._move("rollback", head, replace(head, version=record.version), author, record)
            on_head(record)
            fault("rollback.swapped")
        return record

    def delete(
        self, name: str, *, author: str, expected: Expected = None, on_head: Callable[[], None] = _nothing
    ) -> None:
        """Let a name stand for nothing; its versions are gone, and their numbers stay used.

        Raises NameNotFound and VersionMismatch.
        """
        with storing(), self._locks.changing(), self._existing(name, expected) as head:
            after = replace(head, deleted=True, pinned=False, floor=head.latest + 1)
            self._move("delete", head, after, author)
            on_head()
            fault("delete.swapped")

    def set_pinned(self, name: str, pinned: bool, *, author: str) -> Head:
        """Remember whether a name's prompt is to stay on the device; raises NameNotFound."""
        with storing(), self._locks.changing(), self._existing(name, None) as head:
            after = replace(head, pinned=pinned)
            self._move("pin" if pinned else "unpin", head, after, author)
        return after

    # -- Looking

    def heads(self) -> Iterator[Head]:
        """What names stand for, sorted by name, deleted ones included; a damaged HEAD is left out."""
        with storing():
            names = self._refs.names()
        for name in names:
            try:
                head = self.head(name)
            except BlobCorrupt:
                continue
            if head is not None:
                yield head

    def head(self, name: str) -> Head | None:
        """What a name stands for; None for one that was never published. Raises BlobCorrupt if it cannot be read."""
        if not is_name(name):
            return None
        with _reading():
            return self._refs.head(name)

    def record(self, name: str, version: int) -> VersionRecord:
        """One version; raises NameNotFound, VersionNotFound and BlobCorrupt."""
        head = self.head(name)
        if head is None or head.deleted:
            raise NameNotFound("No prompt has this name; list the prompts to see those that exist.")
        record = self._record(head, version)
        if record is None:
            raise VersionNotFound("The prompt has no such version; list its versions to see those that are kept.")
        return record

    def versions(self, name: str) -> list[VersionRecord]:
        """Those that are kept and can be read, oldest first; none of an unknown or deleted name."""
        head = self.head(name)
        if head is None:
            return []
        found = []
        for number in self._numbers(head):
            with suppress(BlobCorrupt):
                found.append(self._record(head, number))
        return [record for record in found if record]  # one may have been collected meanwhile

    def blob_path(self, record: VersionRecord) -> Path:
        """Where a version's file is; whoever reads it checks its content."""
        return self._disk.root / self._blobs.place(record.file_sha256)

    def read(self, record: VersionRecord) -> bytes:
        """A version's whole file; raises BlobCorrupt if it is not what was written."""
        with _reading():
            return self._blobs.read(record)

    # -- Care

    def recover(self, *, fall_back: bool = True) -> Recovery:
        """At start: verify what every name stands for, and clear away what dead processes left.

        A name whose version is damaged stands for the newest whole one before it from then on, if `fall_back` says so.
        Raises StorageFailed only if the registry cannot be read at all.
        """
        parts = self._disk, self._refs, self._blobs, self._audit, self._locks
        with storing():
            return Recoverer(*parts).recover(fall_back=fall_back, before=self._opened)

    def collect(self, *, older_than_s: float = 3600) -> Collected:
        """Remove versions beyond `keep_versions` and files that no version needs; raises StorageFailed."""
        parts = self._disk, self._refs, self._blobs, self._audit, self._locks
        with storing():
            collector = Collector(*parts, keep_versions=self._keep_versions)
            return collector.collect(before=time.time() - older_than_s)

    # -- Steps

    @contextmanager
    def _living(self, name: str, expected: Expected) -> Iterator[Head | None]:
        """Alone with a name that lives, or that may come to life by being one of at most `max_names`; and its HEAD."""
        if _lives(self._refs.head(name)):
            with self._refs.lock(name):
                if _lives(head := self._refs.head(name)):
                    check_expected(head, expected)
                    yield head
                    return
        with self._locks.coming_to_life():
            known = self._refs.head(name)
            if known is None:
                check_expected(None, expected)
            self._require_room(name)
            if known is None:
                self._refs.make(name)
            with self._refs.lock(name):
                head = self._refs.head(name)
                check_expected(head, expected)
                yield head

    def _require_room(self, name: str) -> None:
        """Counts the living only where the names that ever were might be too many."""
        if self._refs.count() < self._max_names:
            return
        if sum(not head.deleted for head in self.heads() if head.name != name) >= self._max_names:
            raise RegistryFull(f"the registry holds at most {self._max_names} prompts; delete one or raise the limit")

    @contextmanager
    def _existing(self, name: str, expected: Expected) -> Iterator[Head]:
        """Alone with a name that is not deleted, and its HEAD."""
        head = self._refs.head(name) if is_name(name) else None
        if head is not None:
            with self._refs.lock(name):
                head = self._refs.head(name)
                if head is not None and not head.deleted:
                    check_expected(head, expected)
                    yield head
                    return
        check_expected(head, expected)
        raise NameNotFound("No prompt has this name; list the prompts to see those that exist.")

    def _same(self, head: Head | None, prompt: Prompt) -> VersionRecord | None:
        """HEAD's version, if it has the same content and is whole."""
        return self._whole(head, head.version, prompt.digest) if head else None

    def _before(self, head: Head) -> VersionRecord:
        for number in reversed([n for n in self._numbers(head) if n < head.version]):
            if record := self._whole(head, number):
                return record
        raise VersionNotFound("No earlier version is kept; publish one, or name the version to go to.")

    def _whole(self, head: Head, version: int, sha256: str | None = None) -> VersionRecord | None:
        """A version, if it is there, undamaged and, where that is asked for, of this content."""
        try:
            record = self._record(head, version)
            if record is None or sha256 not in (None, record.sha256):
                return None
            self._check(record)
        except BlobCorrupt:
            return None
        return record

    def _record(self, head: Head, version: int) -> VersionRecord | None:
        with _reading():
            return self._refs.record(head.name, version) if head.has(version) else None

    def _check(self, record: VersionRecord) -> None:
        with _reading():
            self._blobs.check(record)

    def _numbers(self, head: Head) -> list[int]:
        with _reading():
            return [number for number in self._refs.versions(head.name) if head.has(number)]

    def _move(
        self, action: str, before: Head | None, after: Head, author: str, record: VersionRecord | None = None
    ) -> None:
        """Move HEAD unless it stands there already, and write the audit line."""
        digest = record.sha256 if record else None
        audit = partial(self._audit.append, action=action, author=author, head=after, sha256=digest)
        if after == before:
            self._refs.settle(after.name)
            audit()
        else:
            self._refs.move_head(after, what=action, then=audit)
        fault(f"{action}.audited")


def _lives(head: Head | None) -> bool:
    return head is not None and not head.deleted


@contextmanager
def _reading() -> Iterator[None]:
    """What cannot be read is damaged."""
    try:
        yield
    except OSError as error:
        raise BlobCorrupt("a stored file cannot be read; look at the registry's volume") from error
