"""Disks for tests of the store: one that syncs nothing, and one that tells of every change, and may be kept from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from promptmux_prompts.disk import Disk


class QuickDisk(Disk):
    """Syncs nothing: for tests in which no power fails."""

    def sync(self, file: int) -> None:
        pass

    def sync_folder(self, place: str) -> None:
        pass


@dataclass(frozen=True)
class Change:
    """One call that changes the disk, or makes a change durable."""

    what: str
    """create, open, write, truncate, sync, rename, unlink, make_folder or sync_folder."""
    place: str
    """Of "create" before it happened: the folder."""
    file: int = 0
    """Which file, of those that were opened so far; 0 for changes that are not about an open one."""
    data: bytes = b""
    target: str = ""
    size: int = 0


def nothing(_: Change) -> None:
    """Watches without a word."""


@dataclass
class _Opened:
    number: int
    place: str


class WatchedDisk(QuickDisk):
    """Calls `before` each change, which may raise instead, and `after` it. Syncs are told of, and not carried out."""

    def __init__(
        self, root: Path, *, before: Callable[[Change], None] = nothing, after: Callable[[Change], None] = nothing
    ) -> None:
        super().__init__(root)
        self.before, self.after = before, after
        self._open: dict[int, _Opened] = {}
        self._count = 0

    def _change(self, change: Change, act: Callable[[], Any]) -> Any:
        self.before(change)
        result = act()
        self.after(change)
        return result

    def _opened(self, file: int, place: str) -> _Opened:
        self._count += 1
        self._open[file] = _Opened(self._count, place)
        return self._open[file]

    def make_folder(self, place: str) -> None:
        self._change(Change("make_folder", place), lambda: super(WatchedDisk, self).make_folder(place))

    def create(self, folder: str) -> tuple[int, str]:
        self.before(Change("create", folder))
        file, place = super().create(folder)
        self.after(Change("create", place, self._opened(file, place).number))
        return file, place

    def open_log(self, place: str) -> int:
        self.before(Change("open", place))
        file = super().open_log(place)
        self.after(Change("open", place, self._opened(file, place).number))
        return file

    def write(self, file: int, data: bytes) -> None:
        opened = self._open[file]
        change = Change("write", opened.place, opened.number, data=bytes(data))
        self._change(change, lambda: super(WatchedDisk, self).write(file, data))

    def truncate(self, file: int, size: int) -> None:
        opened = self._open[file]
        change = Change("truncate", opened.place, opened.number, size=size)
        self._change(change, lambda: super(WatchedDisk, self).truncate(file, size))

    def sync(self, file: int) -> None:
        opened = self._open[file]
        self._change(Change("sync", opened.place, opened.number), lambda: None)

    def close(self, file: int) -> None:
        del self._open[file]
        super().close(file)

    def sync_folder(self, place: str) -> None:
        self._change(Change("sync_folder", place), lambda: None)

    def rename(self, old: str, new: str) -> None:
        self._change(Change("rename", old, target=new), lambda: super(WatchedDisk, self).rename(old, new))

    def unlink(self, place: str) -> None:
        self._change(Change("unlink", place), lambda: super(WatchedDisk, self).unlink(place))


@dataclass
class Failing:
    """A `before` that lets the n-th change fail; with `lasting`, all later ones of its kind as well, until `healed`."""

    nth: int
    error: int
    lasting: bool = False
    seen: int = 0
    kind: str | None = None
    """Of the change that failed; None: none did."""
    healed: bool = False
    dirty: set[int] = field(default_factory=set)
    """Files whose sync failed, and which were not written to since."""
    retried: list[Change] = field(default_factory=list)
    """Syncs of such files."""

    def __call__(self, change: Change) -> None:
        if change.what == "sync" and change.file in self.dirty:
            self.retried.append(change)
        if change.what == "write":
            self.dirty.discard(change.file)
        self.seen += 1
        if self.healed or not (self.seen == self.nth or (self.lasting and change.what == self.kind)):
            return
        self.kind = change.what
        if change.what == "sync":
            self.dirty.add(change.file)
        raise OSError(self.error, "as the test wants it")
