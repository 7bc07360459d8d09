"""Every line of a source looked at once, before anything is learned: which are good, and what is wrong with others.

What was found is kept for the next start, as long as file, task, reader and pictures are the same and nothing was
wrong. Owns the allowance for bad lines, and the split into what is learned and what is held out.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from promptmux_server.backbone.images import ImageLimits
from promptmux_server.errors import DataError
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.pictures import Picture, Size, UnreadablePicture
from promptmux_server.training.data.sample import BadLine, Defect, Sample
from promptmux_server.training.data.source import Source
from promptmux_server.training.data.tables import read_table, write_table
from promptmux_server.training.data.whole_pictures import WholePictures

log = logging.getLogger(__name__)

BAD_LINES_KEPT = 20
ROWS_AT_ONCE = 4096
HASHES = 1 << 32
TOLD_EVERY_S = 30.0
"""Between two words in the log about a file that takes long."""

Lines = npt.NDArray[np.uint32]
Side = Literal["all", "train", "heldout"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Chosen samples of a source, in the file's order."""

    source: Source
    lines: Lines
    groups: Lines
    """The hash of each one's group."""

    def __len__(self) -> int:
        return len(self.lines)

    def sample(self, number: int) -> Sample:
        """Raises DataError."""
        return self.source.sample(int(self.lines[number]))


@dataclass(frozen=True, eq=False)
class Survey:
    """What a source holds. `found` has two numbers for each good line: which it is, and the hash of its group."""

    source: Source
    found: Lines  # (good lines, 2)
    bad_count: int
    bad: tuple[BadLine, ...]
    """The first of the bad lines."""

    def allow(self, skipped: int) -> Survey:
        """Itself, if at most this many lines are left out; raises DataError naming the first bad ones."""
        if self.bad_count <= skipped:
            return self
        lines = "\n".join(f"  {line}" for line in self.bad)
        more = f"\n  and {self.bad_count - len(self.bad)} more" if self.bad_count > len(self.bad) else ""
        raise DataError(
            f"{self.source.name}: {self.bad_count} of {len(self.source)} lines cannot be used. Mend them, or allow as "
            f"many to be left out.\n{lines}{more}"
        )

    def rows(self, side: Side = "all", heldout: float = 0.0) -> Rows:
        """One side of a split that holds out a share of the groups, the same ones whenever it is asked.

        Raises DataError if nothing is left on that side.
        """
        found = self.found
        if side != "all":
            found = found[(found[:, 1] < round(heldout * HASHES)) == (side == "heldout")]
        if not len(found):
            raise DataError(
                f"{self.source.name}: no sample is left to learn from or to score on. Add samples, or change the share "
                "that is held out."
            )
        return Rows(self.source, found[:, 0], found[:, 1])


def survey(
    source: Source,
    encoder: SampleEncoder,
    cache: Path,
    *,
    pixels: bool = False,
    limits: ImageLimits | None = None,
    progress: Callable[[int], None] | None = None,
) -> Survey:
    """Look at every line: its fields, its tokens, its picture's header, and with `pixels` all of its picture.

    Pictures that were decoded before are not decoded again. Without `progress` a word in the log says how far it is.
    """
    identity = f"{source.identity} {encoder.identity} {pixels}"
    kept = cache / f"survey-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
    limits = limits or ImageLimits()
    whole = WholePictures(cache, limits) if pixels else None
    look = _Look(source, encoder, limits, whole)
    table = read_table(kept, "<u4")
    if table is None or (whole is not None and _changed(source, table.rows[::2], whole)):
        table = write_table(kept, "<u4", look.rows(progress or _in_the_log(source)))
    if look.bad_count:
        kept.unlink(missing_ok=True)  # a picture that was missing may be there next time; the mapping stays valid
    return Survey(source, table.rows.reshape(-1, 2), look.bad_count, tuple(look.bad))


def _changed(source: Source, good: Lines, whole: WholePictures) -> bool:
    """Whether a good line's picture is another one by now, or gone; those within lines are the file's own."""
    if source.inline:
        return False
    pictures = (source.parse(int(number)).picture for number in good)
    try:
        return not all(picture is None or whole.knows(picture) for picture in pictures)
    except UnreadablePicture:
        return True


def _in_the_log(source: Source) -> Callable[[int], None]:
    told_s = time.monotonic()

    def progress(done: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= TOLD_EVERY_S:
            told_s = time.monotonic()
            # A warning, since a command that trains shows nothing less.
            log.warning("%s: %d of %d lines are looked at, once, with their pictures.", source.name, done, len(source))

    return progress


class _Look:
    """One pass over a source."""

    def __init__(
        self, source: Source, encoder: SampleEncoder, limits: ImageLimits, whole: WholePictures | None
    ) -> None:
        """With `whole` pictures are decoded, without it their headers are read."""
        self._source, self._encoder, self._limits, self._whole = source, encoder, limits, whole
        self._last: tuple[Picture, Size] | None = None
        self.bad: list[BadLine] = []
        self.bad_count = 0

    def rows(self, progress: Callable[[int], None]) -> Iterator[Lines]:
        rows: list[tuple[int, int]] = []
        for number in range(len(self._source)):
            try:
                sample = self._source.parse(number)
                self._encoder.example(sample, size=self._size(sample))
                rows.append((number, group_hash(sample.group)))
            except Defect as defect:
                self.bad_count += 1
                if len(self.bad) < BAD_LINES_KEPT:
                    self.bad.append(BadLine(self._source.place(number, defect.entry), defect.reason))
            if len(rows) == ROWS_AT_ONCE or number + 1 == len(self._source):
                yield np.array(rows, np.uint32).reshape(-1)
                if self._whole is not None:
                    self._whole.keep()  # so that who is stopped on the way has not looked in vain
                progress(number + 1)
                rows = []

    def _size(self, sample: Sample) -> Size | None:
        """The size of a sample's picture; the lines about one picture mostly follow one another."""
        picture = sample.picture
        if picture is None:
            return None
        if self._last is None or self._last[0] != picture:
            try:
                size = picture.size(self._limits)
                if self._whole is not None:
                    self._whole.check(picture)
            except UnreadablePicture as error:
                raise Defect(str(error), sample.entry) from error
            self._last = (picture, size)
        return self._last[1]


def group_hash(group: str) -> int:
    """32 bits that are the same in every process, whatever the file's order."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=4).digest(), "big")
