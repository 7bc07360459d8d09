"""One file of pictures that the stem has seen: written once, renamed into place, and memory-mapped ever after.

Records, then an index in JSON, then a footer with the index's place and digest. A file whose footer does not fit is no
segment; each record carries a checksum, looked at when the record is first read. Knows no folder and no budget.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import secrets
import struct
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from promptmux_server.backbone.encoder import ImageTokens

SUFFIX = ".features"
PART_SUFFIX = ".part"
ALIGNMENT_BYTES = 64
FOOTER = struct.Struct("<8sQ32s")
"""Magic, where the index begins, sha256 of the index."""
MAGIC = b"pmxfeat1"


class DamagedSegment(ValueError):
    """A file that is not a whole segment, or a record that is not what was written."""


@dataclass(frozen=True, eq=False)
class SeenPicture:
    """What the stem said of a picture, and the size of the picture as it is stored, in pixels."""

    image: ImageTokens
    width: int
    height: int

    @property
    def nbytes(self) -> int:
        return self.image.tokens.nbytes


@dataclass(frozen=True)
class _Record:
    offset: int
    shape: tuple[int, int]  # (N, d_model)
    dtype: str
    grid: tuple[int, int]
    size: tuple[int, int]
    checksum: int


class Segment:
    """A segment on disk."""

    def __init__(self, path: Path) -> None:
        """Raises DamagedSegment, OSError."""
        self.path = path
        with path.open("rb") as file:
            self.nbytes = file.seek(0, 2)
            if self.nbytes < FOOTER.size:
                raise DamagedSegment(path.name)
            # Private and writable, because torch warns of tensors that it must not write to; nobody writes.
            self._bytes = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._records = self._index()
        self._checked: set[int] = set()

    @property
    def keys(self) -> Iterable[str]:
        return self._records.keys()

    def _index(self) -> dict[str, _Record]:
        magic, start, digest = FOOTER.unpack(self._bytes[-FOOTER.size :])
        text = self._bytes[start : -FOOTER.size]
        if magic != MAGIC or hashlib.sha256(text).digest() != digest:
            raise DamagedSegment(self.path.name)
        rows, keys = json.loads(text)
        records = [_Record(o, (n, d), dtype, (r, c), (w, h), crc) for o, n, d, dtype, r, c, w, h, crc in rows]
        return {key: records[number] for key, number in keys.items()}

    def read(self, key: str) -> SeenPicture:
        """The picture of a key that is there; its tokens are a view of the file. Raises DamagedSegment."""
        record = self._records[key]
        dtype: torch.dtype = getattr(torch, record.dtype)
        count = record.shape[0] * record.shape[1]
        if record.offset not in self._checked:
            end = record.offset + count * dtype.itemsize
            if zlib.crc32(memoryview(self._bytes)[record.offset : end]) != record.checksum:
                raise DamagedSegment(self.path.name)
            self._checked.add(record.offset)
        tokens = torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=record.offset).view(record.shape)
        return SeenPicture(ImageTokens(tokens, record.grid), *record.size)


def write_segment(folder: Path, pictures: Mapping[str, SeenPicture]) -> Path:
    """Write pictures by key, one that has several keys once; raises OSError, and leaves nothing then."""
    name = secrets.token_hex(8)
    unfinished, target = folder / f"{name}{PART_SUFFIX}", folder / f"{name}{SUFFIX}"
    numbers = {picture: number for number, picture in enumerate(dict.fromkeys(pictures.values()))}
    try:
        with unfinished.open("xb") as file:
            records = [_write_record(file, picture) for picture in numbers]
            index = json.dumps([records, {key: numbers[picture] for key, picture in pictures.items()}]).encode()
            start = file.tell()
            file.write(index)
            file.write(FOOTER.pack(MAGIC, start, hashlib.sha256(index).digest()))
        unfinished.rename(target)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return target


def _write_record(file: BinaryIO, picture: SeenPicture) -> tuple[int | str, ...]:
    tokens = picture.image.tokens.detach().cpu().contiguous()
    data = _bytes_of(tokens)
    file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
    offset = file.tell()
    file.write(data)
    dtype = str(tokens.dtype).removeprefix("torch.")
    return (offset, *tokens.shape, dtype, *picture.image.grid, picture.width, picture.height, zlib.crc32(data))


def _bytes_of(tokens: Tensor) -> memoryview:
    return tokens.view(-1).view(torch.uint8).numpy().data
