"""Pictures that the frozen stem has seen, kept on disk for all epochs, trials and processes that look at them again.

A folder of segments, none of which is ever changed: a process writes what it has seen as a new one, and finds what
others have written when it misses something. What is damaged is removed and seen again. A disk that is full ends the
keeping, never the training. Knows nothing of samples; what a key must name is `backbone.image_key`'s business.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from promptmux_server.training.feature_segment import (
    PART_SUFFIX,
    SUFFIX,
    DamagedSegment,
    SeenPicture,
    Segment,
    write_segment,
)

log = logging.getLogger(__name__)

SEGMENT_BYTES = 64 << 20
"""Pictures wait in memory until they are as many bytes, and are lost if the process dies before."""
ABANDONED_S = 3600.0
"""Age at which an unfinished file is one whose writer has died."""
DAMAGED = "A file of seen pictures is damaged; it is removed, and its pictures are seen again."


@dataclass(frozen=True)
class FeatureCacheLimits:
    """`max_bytes` of all segments together; `reserve_bytes` of the disk are left free, for checkpoints."""

    max_bytes: int = 16 << 30
    reserve_bytes: int = 1 << 30
    segment_bytes: int = SEGMENT_BYTES


@dataclass(frozen=True)
class FeatureCacheStats:
    """Since this process opened it; `keys` are all that can be found."""

    hits: int
    misses: int
    keys: int


class FeatureCache:
    """Of one thread; others, and other processes, may use the same folder at the same time."""

    def __init__(self, folder: Path, limits: FeatureCacheLimits | None = None) -> None:
        self._folder, self._limits = folder, limits or FeatureCacheLimits()
        self._segments: dict[str, Segment] = {}
        self._found: dict[str, Segment] = {}
        self._used: set[str] = set()
        self._waiting: dict[str, SeenPicture] = {}
        self._waiting_bytes = 0
        self._listed_ns = -1
        self._hits = self._misses = 0
        self._keeps = True
        with self._or_give_up():
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
        self._look_for_segments()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.flush()

    @property
    def keeps(self) -> bool:
        """Whether new pictures are still kept."""
        return self._keeps

    def stats(self) -> FeatureCacheStats:
        return FeatureCacheStats(self._hits, self._misses, len(self._found.keys() | self._waiting.keys()))

    def find(self, key: str) -> SeenPicture | None:
        """What was kept under a key, by whichever process."""
        found = self._find(key)
        self._hits += found is not None
        self._misses += found is None
        return found

    def keep(self, keys: Iterable[str], picture: SeenPicture) -> None:
        """Keep a picture under all of its keys; its tokens must not be changed afterwards."""
        if not self._keeps:
            return
        self._waiting |= dict.fromkeys(keys, picture)
        self._waiting_bytes += picture.nbytes
        if self._waiting_bytes >= self._limits.segment_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits, so that other processes and later runs find it."""
        if not self._waiting or not self._keeps:
            return
        with self._or_give_up():
            self._make_room(self._waiting_bytes)
            self._open(write_segment(self._folder, self._waiting))
            self._waiting, self._waiting_bytes = {}, 0

    def _find(self, key: str) -> SeenPicture | None:
        if key in self._waiting:
            return self._waiting[key]
        if key not in self._found:
            self._look_for_segments()
        segment = self._found.get(key)
        if segment is None:
            return None
        try:
            picture = segment.read(key)
        except DamagedSegment:
            log.warning(DAMAGED)
            self._forget(segment)
            return None
        if segment.path.name not in self._used:
            self._used.add(segment.path.name)
            with suppress(OSError):
                os.utime(segment.path)  # so that whoever makes room takes older ones first
        return picture

    def _look_for_segments(self) -> None:
        """Open what is new in the folder, if anything is."""
        try:
            changed_ns = self._folder.stat().st_mtime_ns
            if changed_ns == self._listed_ns:
                return
            paths = sorted(self._folder.glob(f"*{SUFFIX}"))
        except OSError:
            return
        for path in paths:
            if path.name not in self._segments:
                self._open(path)
        # A clock tick may hide a second change: what changed just now is listed again next time.
        self._listed_ns = changed_ns if time.time_ns() - changed_ns > 1_000_000_000 else -1

    def _open(self, path: Path) -> None:
        try:
            segment = Segment(path)
        except DamagedSegment:
            log.warning(DAMAGED)
            path.unlink(missing_ok=True)
        except OSError:
            return  # somebody else removed it, or may read it and we may not
        else:
            self._segments[path.name] = segment
            self._found |= dict.fromkeys(segment.keys, segment)

    def _forget(self, segment: Segment) -> None:
        with suppress(OSError):
            segment.path.unlink(missing_ok=True)
        self._segments.pop(segment.path.name, None)
        self._found = {key: other for key, other in self._found.items() if other is not segment}

    def _make_room(self, wanted: int) -> None:
        """Remove segments that nobody has read lately; raises OSError if that is not enough."""
        self._look_for_segments()
        held = sum(segment.nbytes for segment in self._segments.values())
        free = shutil.disk_usage(self._folder).free - self._limits.reserve_bytes
        excess = max(held + wanted - self._limits.max_bytes, wanted - free)
        for segment in sorted(self._segments.values(), key=_last_used):
            if excess <= 0:
                return
            if segment.path.name not in self._used:
                self._forget(segment)
                excess -= segment.nbytes
        if excess > 0:
            raise OSError("there is no room left within its limits")

    def _remove_abandoned(self) -> None:
        for path in self._folder.glob(f"*{PART_SUFFIX}"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        """Go on without keeping more if the disk refuses; what was kept, and what waits, can still be found."""
        try:
            yield
        except OSError as error:
            self._keeps = False
            log.warning(
                "Seen pictures are no longer kept: %s. Training goes on, and pictures pass the stem again in every "
                "epoch. Make room, or give the cache another folder or larger limits.",
                error.strerror or error,
            )


def _last_used(segment: Segment) -> float:
    try:
        return segment.path.stat().st_mtime
    except OSError:
        return 0.0
