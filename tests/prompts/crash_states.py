"""What a disk may hold after a power cut: every tree that a recorded run of changes allows at a moment of it.

Data that were not synced are kept, lost, or kept by half. In a folder that was not synced, each name that was given,
taken away or replaced may have been or not, whatever became of the others. Owns the model; judges nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from prompts.watched_disk import Change

Tree = dict[str, bytes | None]
"""Content by path; None: a folder."""

MAX_COMBINED = 64
"""Where more states are possible, each uncertain thing is varied alone, among all kept and among all lost."""

ROOT = 0
T = TypeVar("T")


def tree_of(root: Path) -> Tree:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }


def plant(tree: Tree, root: Path) -> Path:
    """Make a tree on a real disk."""
    root.mkdir()
    for path, content in sorted(tree.items()):
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)
    return root


@dataclass
class _File:
    synced: bytes = b""
    now: bytes = b""

    def outcomes(self) -> list[bytes]:
        if self.now == self.synced:
            return [self.now]
        grown = self.now.startswith(self.synced)
        half = self.now[: (len(self.synced) + len(self.now)) // 2] if grown else self.synced[: len(self.synced) // 2]
        return [self.now, half, self.synced]


@dataclass
class _Folder:
    now: dict[str, int] = field(default_factory=dict)
    """Numbers of files and folders by name."""
    synced: dict[str, int] = field(default_factory=dict)
    pending: list[tuple[str, int | None]] = field(default_factory=list)
    """Names given, or taken away (None), since it was synced."""

    def give(self, name: str, number: int | None) -> None:
        self.pending.append((name, number))
        _apply(self.now, name, number)

    def sync(self) -> None:
        self.synced = dict(self.now)
        self.pending.clear()

    def outcomes(self) -> list[dict[str, int]]:
        found = []
        for happened in _combined([[True, False]] * len(self.pending)):
            held = dict(self.synced)
            for name, number in itertools.compress(self.pending, happened):
                _apply(held, name, number)
            found.append(held)
        return found


def _apply(held: dict[str, int], name: str, number: int | None) -> None:
    if number is None:
        held.pop(name, None)
    else:
        held[name] = number


class CrashModel:
    """A disk that is told of changes one by one; what lies in the folders named `ignored` is left out of its states."""

    def __init__(self, tree: Tree, *, ignored: Sequence[str]) -> None:
        self._ignored = ignored
        self._numbers = itertools.count(ROOT + 1)
        self._files: dict[int, _File] = {}
        self._folders: dict[int, _Folder] = {ROOT: _Folder()}
        self._opened: dict[int, _File] = {}
        for path, content in sorted(tree.items()):
            number = next(self._numbers)
            folder, name = self._parent(path)
            folder.give(name, number)
            if content is None:
                self._folders[number] = _Folder()
            else:
                self._files[number] = _File(content, content)
        for folder in self._folders.values():
            folder.sync()

    def apply(self, change: Change) -> None:
        """Follow a change that has happened."""
        if change.what == "sync_folder":
            self._folder(change.place).sync()
        elif change.what in ("write", "truncate", "sync"):
            self._apply_to_file(change)
        else:
            self._apply_to_names(change)

    def _apply_to_file(self, change: Change) -> None:
        file = self._opened[change.file]
        if change.what == "write":
            file.now += change.data
        elif change.what == "truncate":
            file.now = file.now[: change.size]
        else:
            file.synced = file.now

    def _apply_to_names(self, change: Change) -> None:
        folder, name = self._parent(change.place)
        if change.what == "rename":
            target, new_name = self._parent(change.target)
            target.give(new_name, folder.now[name])
            folder.give(name, None)
        elif change.what == "unlink":
            folder.give(name, None)
        elif name not in folder.now:
            number = next(self._numbers)
            folder.give(name, number)
            if change.what == "make_folder":
                self._folders[number] = _Folder()
            else:
                self._files[number] = _File()
        if change.what in ("create", "open"):
            self._opened[change.file] = self._files[folder.now[name]]

    def states(self) -> Iterator[Tree]:
        """All that the disk might hold if the power failed now."""
        numbers = list(self._folders)
        for chosen in _combined([self._folders[number].outcomes() for number in numbers]):
            names = dict(zip(numbers, chosen, strict=True))
            found = dict(self._walk(names, ROOT, ""))
            files = sorted({number for number in found.values() if number in self._files})
            for contents in _combined([self._files[number].outcomes() for number in files]):
                content = dict(zip(files, contents, strict=True))
                yield {path: content.get(number) for path, number in found.items()}

    def _walk(self, names: dict[int, dict[str, int]], folder: int, prefix: str) -> Iterator[tuple[str, int]]:
        for name, number in names[folder].items():
            yield prefix + name, number
            if number in self._folders and prefix + name not in self._ignored:
                yield from self._walk(names, number, f"{prefix}{name}/")

    def _folder(self, path: str) -> _Folder:
        folder = self._folders[ROOT]
        for part in filter(None, path.split("/")):
            folder = self._folders[folder.now[part]]
        return folder

    def _parent(self, path: str) -> tuple[_Folder, str]:
        parent, _, name = path.rpartition("/")
        return self._folder(parent), name


def _combined(choices: Sequence[Sequence[T]]) -> Iterator[tuple[T, ...]]:
    """One of each: all combinations, or those in which at most one differs from all the first or all the last."""
    if math.prod(map(len, choices)) <= MAX_COMBINED:
        yield from itertools.product(*choices)
        return
    for base in (0, -1):
        usual = [choice[base] for choice in choices]
        yield tuple(usual)
        for place, choice in enumerate(choices):
            for other in choice:
                yield (*usual[:place], other, *usual[place + 1 :])
