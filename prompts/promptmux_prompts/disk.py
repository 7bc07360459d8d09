"""Files beneath one root, written so that they survive a power cut and reached through no symbolic link.

The only module of the store that calls the operating system, so that a test can record every operation or fail it.
Places are relative paths whose parts the caller has checked. Knows nothing of prompts.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE_MODE = 0o664
FOLDER_MODE = 0o2775
"""Two users of one group share a store: what one writes the other reads and replaces, whatever their umasks."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC


class Disk:
    """The operations of a store; every method raises OSError and may be called from any thread."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # -- Changes: what is written lasts after `sync` of the file, and its name after `sync_folder` of its folder.

    def make_folder(self, place: str) -> None:
        """Make a folder, unless it is there."""
        parent, name = os.path.split(place)
        with self._folder(parent) as folder:
            try:
                os.mkdir(name, FOLDER_MODE, dir_fd=folder)
            except FileExistsError:
                return
            inner = os.open(name, _FOLDER | _NO_LINK, dir_fd=folder)
            try:
                os.fchmod(inner, FOLDER_MODE)
            finally:
                os.close(inner)

    def create(self, folder: str) -> tuple[int, str]:
        """A new empty file of a name that nobody has: descriptor and place.

        It stays locked until the descriptor is closed, by which `clear` tells it from what a dead process left.
        """
        while True:
            name = secrets.token_hex(12)
            with self._folder(folder) as parent:
                file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK, FILE_MODE, dir_fd=parent)
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_nlink:  # else it was cleared away before it was locked
                os.fchmod(file, FILE_MODE)
                return file, f"{folder}/{name}"
            os.close(file)

    def clear(self, place: str) -> bool:
        """Remove a file that `create` made, unless somebody alive holds it; whether it was removed."""
        parent, name = os.path.split(place)
        with self._folder(parent) as folder:
            file = os.open(name, os.O_RDWR | os.O_NONBLOCK | _NO_LINK, dir_fd=folder)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.unlink(place)
        except BlockingIOError:
            return False
        finally:
            os.close(file)
        return True

    def open_log(self, place: str) -> int:
        """Open a file for appending; it is made if it is not there."""
        return self._open_or_make(place, os.O_APPEND)

    def write(self, file: int, data: bytes) -> None:
        """Write all of it at the file's end."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]

    def truncate(self, file: int, size: int) -> None:
        os.ftruncate(file, size)

    def sync(self, file: int) -> None:
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def sync_folder(self, place: str) -> None:
        with self._folder(place) as folder:
            os.fsync(folder)

    def rename(self, old: str, new: str) -> None:
        """Give a file another place, and replace what is there."""
        (old_parent, old_name), (new_parent, new_name) = os.path.split(old), os.path.split(new)
        with self._folder(old_parent) as source, self._folder(new_parent) as target:
            os.rename(old_name, new_name, src_dir_fd=source, dst_dir_fd=target)

    def unlink(self, place: str) -> None:
        parent, name = os.path.split(place)
        with self._folder(parent) as folder:
            os.unlink(name, dir_fd=folder)

    # -- Looking

    def read(self, place: str, *, limit: int) -> bytes:
        """A whole file; of a longer one, `limit` + 1 bytes."""
        with self.open(place) as file:
            chunks, missing = [], limit + 1
            while missing and (chunk := os.read(file, min(missing, 1 << 20))):
                chunks.append(chunk)
                missing -= len(chunk)
        return b"".join(chunks)

    def read_back(self, file: int) -> bytes:
        """All that an open file holds, wherever its place is by now."""
        size, chunks, done = os.fstat(file).st_size, [], 0
        while done < size and (chunk := os.pread(file, size - done, done)):
            chunks.append(chunk)
            done += len(chunk)
        return b"".join(chunks)

    @contextmanager
    def open(self, place: str) -> Iterator[int]:
        """A descriptor for reading a plain file."""
        parent, name = os.path.split(place)
        with self._folder(parent) as folder:
            file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _NO_LINK, dir_fd=folder)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise FileNotFoundError
            yield file
        finally:
            os.close(file)

    def status(self, place: str) -> os.stat_result:
        """Of a file or link itself."""
        parent, name = os.path.split(place)
        with self._folder(parent) as folder:
            return os.stat(name, dir_fd=folder, follow_symlinks=False)

    def names(self, place: str, *, of_files: bool = True) -> list[str]:
        """What a folder holds; without `of_files`, only what is no plain file."""
        with self._folder(place) as folder:
            if of_files:
                return os.listdir(folder)
            with os.scandir(folder) as entries:
                return [entry.name for entry in entries if not entry.is_file(follow_symlinks=False)]

    @contextmanager
    def lock(self, place: str, *, shared: bool = False) -> Iterator[None]:
        """Wait for the lock that a file stands for, and hold it. It ends with its holder, however that dies."""
        file = self._open_or_make(place)
        try:
            fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    @contextmanager
    def lock_open(self, file: int) -> Iterator[None]:
        """As `lock`, of an open file."""
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    def _open_or_make(self, place: str, flags: int = 0) -> int:
        parent, name = os.path.split(place)
        flags |= os.O_RDWR | _NO_LINK
        with self._folder(parent) as folder:
            try:
                return os.open(name, flags, dir_fd=folder)
            except FileNotFoundError:
                pass
            try:
                file = os.open(name, flags | os.O_CREAT | os.O_EXCL, FILE_MODE, dir_fd=folder)
            except FileExistsError:  # somebody was quicker
                return os.open(name, flags, dir_fd=folder)
        os.fchmod(file, FILE_MODE)
        return file

    @contextmanager
    def _folder(self, place: str) -> Iterator[int]:
        """A descriptor of a folder; a link on the way to it is an error, and the root alone may be one."""
        folder = os.open(self.root, _FOLDER)
        try:
            for part in filter(None, place.split("/")):
                inner = os.open(part, _FOLDER | _NO_LINK, dir_fd=folder)
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)
