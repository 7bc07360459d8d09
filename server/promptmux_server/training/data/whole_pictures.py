"""Which pictures were decoded to their last byte, kept on disk so that none is decoded twice to be checked.

A picture is known by its sketch (see `pictures`), whatever task or file names it; one that was changed is decoded
again. Knows no lines.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from promptmux_server.backbone.images import ImageLimits
from promptmux_server.training.data.pictures import Picture, decoded
from promptmux_server.training.data.tables import read_table, write_table

NAME = "whole-pictures"


class WholePictures:
    """Those that are known in a folder, and those that are found on the way."""

    def __init__(self, cache: Path, limits: ImageLimits) -> None:
        self._path, self._limits = cache / NAME, limits
        self._known = self._kept()
        self._found: set[int] = set()

    def check(self, picture: Picture) -> None:
        """Decode a picture unless it is known; raises UnreadablePicture."""
        key = _key(picture)
        if key not in self._known:
            decoded(picture.read(self._limits), self._limits)
            self._known.add(key)
            self._found.add(key)

    def knows(self, picture: Picture) -> bool:
        """Raises UnreadablePicture if it cannot even be looked at."""
        return _key(picture) in self._known

    def keep(self) -> None:
        """Write what was found since the last time, beside what others found meanwhile; raises DataError."""
        if self._found:
            everything = self._kept() | self._found
            write_table(self._path, "<u8", [np.fromiter(everything, np.uint64, len(everything))])
            self._found.clear()

    def _kept(self) -> set[int]:
        table = read_table(self._path, "<u8")
        return set() if table is None else set(table.rows.tolist())


def _key(picture: Picture) -> int:
    """64 bits: of a million pictures some two share theirs with a probability of 3e-8."""
    return int.from_bytes(hashlib.blake2b(picture.sketch(), digest_size=8).digest(), "big")
