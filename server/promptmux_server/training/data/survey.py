"""Every line of a source looked at once, before anything is learned: which are good, and what is wrong with the others.

What was found is kept for the next start, as long as file, task and reader are the same and nothing was wrong. Owns the
allowance for bad lines, and the split into what is learned and what is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from promptmux_server.backbone.images import ImageLimits
from promptmux_server.errors import DataError
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.pictures import Picture, Size, UnreadablePicture, decoded
from promptmux_server.training.data.sample import BadLine, Defect, Sample
from promptmux_server.training.data.source import Source
from promptmux_server.training.data.tables import read_table, write_table

BAD_LINES_KEPT = 20
ROWS_AT_ONCE = 4096
HASHES = 1 << 32

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
    progress: Callable[[int], None] = lambda _done: None,
) -> Survey:
    """Look at every line: its fields, its tokens, its picture's header, and with `pixels` all of its picture."""
    identity = f"{source.identity} {encoder.identity} {pixels}"
    kept = cache / f"survey-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
    look = _Look(source, encoder, limits or ImageLimits(), pixels)
    table = read_table(kept, "<u4")
    if table is None:
        table = write_table(kept, "<u4", look.rows(progress))
    if look.bad_count:
        kept.unlink(missing_ok=True)  # a picture that was missing may be there next time; the mapping stays valid
    return Survey(source, table.rows.reshape(-1, 2), look.bad_count, tuple(look.bad))


class _Look:
    """One pass over a source."""

    def __init__(self, source: Source, encoder: SampleEncoder, limits: ImageLimits, pixels: bool) -> None:
        self._source, self._encoder, self._limits, self._pixels = source, encoder, limits, pixels
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
                if self._pixels:
                    decoded(picture.read(self._limits), self._limits)
            except UnreadablePicture as error:
                raise Defect(str(error), sample.entry) from error
            self._last = (picture, size)
        return self._last[1]


def group_hash(group: str) -> int:
    """32 bits that are the same in every process, whatever the file's order."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=4).digest(), "big")
