"""A file on its way to the server: its bytes, their sha256, and who is told how much of it has been sent.

Sends nothing itself. The bytes are read once, so that what is announced is what goes out, whatever becomes of the file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

FileSource = str | os.PathLike[str] | bytes
Progress = Callable[[int, int], object]
"""Called with bytes sent so far and bytes in all; it begins again at 0 if a try is repeated."""

PIECE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Upload:
    """A body that can be sent any number of times."""

    data: bytes
    sha256: str
    progress: Progress | None = None

    @classmethod
    def of(cls, source: FileSource, progress: Progress | None = None) -> Self:
        """Raises OSError for a file that cannot be read."""
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        return cls(data, hashlib.sha256(data).hexdigest(), progress)

    def pieces(self) -> Iterator[bytes]:
        """The body; whoever asks for the next piece has sent the one before."""
        for start in range(0, len(self.data), PIECE_BYTES):
            self._tell(start)
            yield self.data[start : start + PIECE_BYTES]
        self._tell(len(self.data))

    async def pieces_async(self) -> AsyncIterator[bytes]:
        for piece in self.pieces():
            yield piece

    def _tell(self, sent_bytes: int) -> None:
        if self.progress is not None:
            self.progress(sent_bytes, len(self.data))
