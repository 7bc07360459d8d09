"""The header of a prompt file, checked by our own eyes before any library parses it.

safetensors accepts duplicate keys, unknown fields, absurd names and millions of empty tensors; a prompt file may hold
exactly the four tensors we know, tightly packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from promptmux_prompts.errors import InvalidPromptFile
from promptmux_prompts.strict_json import parse

METADATA_KEY = "promptmux"
MAX_HEADER_BYTES = 64 * 1024
TENSORS = ("decoder.prefix.key", "decoder.prefix.value", "encoder.prefix.key", "encoder.prefix.value")
"""In the order in which they lie in a file."""
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Header:
    """What a checked header says: the manifest's text, tensor shapes, and one type for all."""

    manifest: str
    shapes: dict[str, tuple[int, int, int, int]]
    dtype: str


def read_header(data: bytes, file_bytes: int | None = None) -> Header:
    """Check the beginning of a prompt file against its whole length; raises InvalidPromptFile.

    `data` may end anywhere behind the header if `file_bytes` says how long the file is.
    """
    file_bytes = len(data) if file_bytes is None else file_bytes
    if len(data) < 8:
        raise InvalidPromptFile("the file is shorter than a header")
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= MAX_HEADER_BYTES:
        raise InvalidPromptFile(f"the header must have 2 to {MAX_HEADER_BYTES} bytes")
    if len(data) < 8 + size:
        raise InvalidPromptFile("the file ends inside its header")
    raw = data[8 : 8 + size]
    if not raw.startswith(b"{"):
        raise InvalidPromptFile("the header must begin with {")
    entries = parse(raw, "header")
    if not isinstance(entries, dict):
        raise InvalidPromptFile("the header must be an object")
    manifest = _metadata(entries.pop("__metadata__", None))
    if unknown := entries.keys() - set(TENSORS):
        raise InvalidPromptFile(f"{len(unknown)} tensors that no prompt file has; allowed are {', '.join(TENSORS)}")
    for side in ("encoder", "decoder"):
        if (f"{side}.prefix.key" in entries) != (f"{side}.prefix.value" in entries):
            raise InvalidPromptFile(f"{side}.prefix.key and {side}.prefix.value must come together")
    spans = {name: _tensor(name, entry) for name, entry in entries.items()}
    dtypes = {dtype for dtype, _, _, _ in spans.values()}
    if len(dtypes) > 1:
        raise InvalidPromptFile("all tensors must have one type")
    _check_packed([(begin, end) for _, _, begin, end in spans.values()], file_bytes - 8 - size)
    return Header(manifest, {name: shape for name, (_, shape, _, _) in spans.items()}, next(iter(dtypes), "F32"))


def _metadata(raw: Any) -> str:
    if not isinstance(raw, dict) or set(raw) != {METADATA_KEY} or not isinstance(raw[METADATA_KEY], str):
        raise InvalidPromptFile(f"the metadata must hold exactly the key {METADATA_KEY}")
    text: str = raw[METADATA_KEY]
    return text


def _tensor(name: str, entry: Any) -> tuple[str, tuple[int, int, int, int], int, int]:
    """(type, shape, begin, end) of one entry."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidPromptFile(f"{name} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InvalidPromptFile(f"{name} must be F32, F16 or BF16")
    if not _whole_numbers(shape, 4) or not _whole_numbers(offsets, 2) or max(shape) > 1 << 20:
        raise InvalidPromptFile(f"{name} must have four dimensions and two offsets")
    count = shape[0] * shape[1] * shape[2] * shape[3]
    if offsets[1] - offsets[0] != count * ITEM_BYTES[dtype]:
        raise InvalidPromptFile(f"{name} has a shape that does not fit its offsets")
    return dtype, (shape[0], shape[1], shape[2], shape[3]), offsets[0], offsets[1]


def _whole_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    )


def _check_packed(spans: list[tuple[int, int]], size: int) -> None:
    """Tensors follow one another from the first byte to the last: no hole, no overlap, nothing behind."""
    end = 0
    for begin, finish in sorted(spans):
        if begin != end:
            raise InvalidPromptFile("tensors must follow one another without holes or overlaps")
        end = finish
    if end != size:
        raise InvalidPromptFile("the tensors must fill the file exactly")
