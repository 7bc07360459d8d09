"""Small files of numbers that are written once and memory-mapped: indices of lines, and what a check of them found.

They can always be made again, so nothing is flushed to the disk: a file carries the digest of its numbers, and one that
was cut or damaged counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from promptmux_server.errors import DataError

HEADER_BYTES = 512
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Table:
    """Memory-mapped rows, and what their writer noted beside them."""

    rows: npt.NDArray[Any]
    note: Mapping[str, Any]


def read_table(path: Path, dtype: npt.DTypeLike) -> Table | None:
    """The table at a path; None if it is not there, not whole or of another type."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            count = (file.tell() - HEADER_BYTES) // np.dtype(dtype).itemsize
    except (OSError, ValueError):
        return None
    if not isinstance(header, dict) or (header.get("format"), header.get("sha256")) != (FORMAT, digest):
        return None
    if header.get("dtype") != np.dtype(dtype).str or header.get("count") != count:
        return None
    if not count:
        return Table(np.empty(0, dtype), header["note"])
    return Table(np.memmap(path, dtype, "r", offset=HEADER_BYTES), header["note"])


def write_table(
    path: Path, dtype: npt.DTypeLike, parts: Iterable[npt.NDArray[Any]], note: Mapping[str, Any] | None = None
) -> Table:
    """Write rows part by part, and rename the file into its place when it is whole.

    `note` may still be filled while parts are drawn. Raises DataError if the disk does not take it.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    sha, count = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.seek(HEADER_BYTES)
            for part in parts:
                rows = np.ascontiguousarray(part, dtype)
                sha.update(rows.view(np.uint8).data)
                file.write(rows.view(np.uint8).data)
                count += len(rows)
            file.seek(0)
            file.write(_header(np.dtype(dtype), count, sha.hexdigest(), note or {}))
        table = read_table(unfinished, dtype)  # before others can remove it; the mapping outlives the name
        unfinished.rename(path)
    except OSError as error:
        raise DataError(
            "The index of the data cannot be written: make room on the disk, or name another folder for what training "
            f"keeps ({error.strerror})."
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    if table is None:
        raise DataError("The index of the data cannot be read back: the disk does not keep what is written to it.")
    return table


def _header(dtype: np.dtype[Any], count: int, sha256: str, note: Mapping[str, Any]) -> bytes:
    fields = {"format": FORMAT, "dtype": dtype.str, "count": count, "sha256": sha256, "note": dict(note)}
    text = json.dumps(fields).encode()
    assert len(text) < HEADER_BYTES
    return text.ljust(HEADER_BYTES - 1) + b"\n"
