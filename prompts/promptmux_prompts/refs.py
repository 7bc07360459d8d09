"""What names stand for, on disk: a file for each version, and one HEAD a name, which is all that ever changes.

Owns `refs/`. Every file is written aside, synced and renamed into place: a reader sees the old one or the new one.
Knows nothing of blobs or of who may change what; the caller holds the name's lock.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from promptmux_prompts.disk import Disk
from promptmux_prompts.errors import BlobCorrupt
from promptmux_prompts.faults import fault
from promptmux_prompts.records import MAX_RECORD_BYTES, Head, VersionRecord, is_name

REFS, TMP = "refs", "tmp"
VERSION = re.compile(r"[1-9][0-9]{0,17}")


class Refs:
    """The names of one store; raises OSError and BlobCorrupt."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def names(self) -> list[str]:
        """All that were ever published, deleted ones included, sorted."""
        return sorted(name for name in self._disk.names(REFS, of_files=False) if is_name(name))

    def count(self) -> int:
        """At least as many as there are names."""
        return len(self._disk.names(REFS))

    def head(self, name: str) -> Head | None:
        try:
            head = Head.from_json(self._disk.read(self.head_place(name), limit=MAX_RECORD_BYTES))
        except FileNotFoundError:
            return None
        if head.name != name:
            raise BlobCorrupt("a HEAD of the store is another name's")
        return head

    def record(self, name: str, version: int) -> VersionRecord | None:
        try:
            record = VersionRecord.from_json(self._disk.read(self.place(name, version), limit=MAX_RECORD_BYTES))
        except FileNotFoundError:
            return None
        if (record.name, record.version) != (name, version):
            raise BlobCorrupt("a version's record in the store is another version's")
        return record

    def versions(self, name: str) -> list[int]:
        """Numbers of all records there are, finished or not, ascending."""
        try:
            stems = [file.removesuffix(".json") for file in self._disk.names(f"{REFS}/{name}")]
        except FileNotFoundError:
            return []
        return sorted(int(stem) for stem in stems if VERSION.fullmatch(stem))

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Alone with a name, among all threads and processes."""
        with self._disk.lock(f"{REFS}/{name}/lock"):
            yield

    def make(self, name: str) -> None:
        """A folder for a new name, durable before anything in it counts."""
        self._disk.make_folder(f"{REFS}/{name}")
        self._disk.sync_folder(REFS)

    def write(self, record: VersionRecord) -> None:
        """Keep a version's record, before any HEAD names it."""
        place = self.place(record.name, record.version)
        with self._aside(record.to_json().encode(), "publish.ref") as new:
            self._disk.rename(new, place)
            fault("publish.ref_renamed")
            self._disk.sync_folder(f"{REFS}/{record.name}")
        fault("publish.ref_dir_synced")

    def move_head(self, head: Head, *, what: str, then: Callable[[], None]) -> None:
        """Let a name stand for something else and do what belongs to that; if either fails, the old HEAD stands again.

        The old HEAD is written aside and synced first, so that putting it back needs neither room nor a sync.
        """
        place = self.head_place(head.name)
        with self._backup(place, what) as put_back, self._aside(head.to_json().encode(), f"{what}.head") as new:
            self._disk.rename(new, place)
            try:
                fault(f"{what}.head_renamed")
                self._disk.sync_folder(f"{REFS}/{head.name}")
                fault(f"{what}.head_dir_synced")
                then()
            except Exception:
                with suppress(OSError):  # as far as the disk lets us
                    put_back()
                    self._disk.sync_folder(f"{REFS}/{head.name}")
                raise

    @contextmanager
    def _backup(self, place: str, what: str) -> Iterator[Callable[[], None]]:
        """What lets the present state of a file stand again."""
        try:
            old = self._disk.read(place, limit=MAX_RECORD_BYTES)
        except FileNotFoundError:
            old = None
        if old is None:
            yield partial(self._disk.unlink, place)
            return
        with self._aside(old, f"{what}.backup") as aside:
            yield partial(self._disk.rename, aside, place)
            with suppress(OSError):  # recovery clears it away as well
                self._disk.unlink(aside)

    @contextmanager
    def _aside(self, data: bytes, point: str) -> Iterator[str]:
        """The place of a synced new file, which the caller renames; one that fails leaves none."""
        file, place = self._disk.create(TMP)
        try:
            self._disk.write(file, data)
            fault(f"{point}_written")
            self._disk.sync(file)
            fault(f"{point}_synced")
            yield place
        except Exception:
            with suppress(OSError):
                self._disk.unlink(place)
            raise
        finally:
            self._disk.close(file)

    def remove(self, name: str, version: int) -> None:
        self._disk.unlink(self.place(name, version))

    def set_aside(self, name: str, version: int, folder: str) -> None:
        """Move a damaged record out of the way, for somebody to look at."""
        self._disk.rename(self.place(name, version), f"{folder}/{name}.{version}.json")

    def settle(self, name: str) -> None:
        """Make sure that what can be read of a name would survive a power cut, whoever wrote it and died."""
        self._disk.sync_folder(f"{REFS}/{name}")
        self._disk.sync_folder(REFS)

    @staticmethod
    def place(name: str, version: int) -> str:
        return f"{REFS}/{name}/{version}.json"

    @staticmethod
    def head_place(name: str) -> str:
        return f"{REFS}/{name}/HEAD.json"
