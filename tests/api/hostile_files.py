"""Files that are no prompts: made by hand, each for one mistake or trick, and made of a good one at random."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from safetensors.torch import save

import tiny
from promptmux_prompts import write_prompt

GOOD = write_prompt(tiny.prompt("target", image_size=None, decoding={"method": "greedy", "max_length": 4}))


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: bytes, body: bytes, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header + body


def edited(change: Callable[[dict[str, Any]], object], body: Callable[[bytes], bytes] = lambda data: data) -> bytes:
    header, rest = split(GOOD)
    change(header)
    return joined(json.dumps(header).encode(), body(rest))


def tensor(name: str, **fields: Any) -> bytes:
    return edited(lambda header: header[name].update(fields))


def manifest(**fields: Any) -> bytes:
    def change(header: dict[str, Any]) -> None:
        told = json.loads(header["__metadata__"]["promptmux"]) | fields
        header["__metadata__"]["promptmux"] = json.dumps(told)

    return edited(change)


def cast(dtype: torch.dtype) -> bytes:
    header, _ = split(GOOD)
    prompt = tiny.prompt("target", image_size=None)
    return save({name: part.to(dtype) for name, part in prompt.tensors.items()}, header["__metadata__"])


def swapped_names(header: dict[str, Any]) -> None:
    for part in ("key", "value"):
        one, other = f"encoder.prefix.{part}", f"decoder.prefix.{part}"
        header[one], header[other] = header[other], header[one]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(1 << 20))
    return buffer.getvalue()


def empty_tensors(count: int) -> bytes:
    header = {f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(count)}
    return joined(json.dumps(header).encode(), b"")


KEY = "encoder.prefix.key"
HEADER = GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")]
BODY = GOOD[8 + len(HEADER) :]


@cache
def named() -> dict[str, bytes]:
    """One file for each mistake."""
    duplicate = HEADER.replace(b'{"', b'{"__metadata__":{},"', 1)
    return {
        "nothing": b"",
        "seven bytes": GOOD[:7],
        "a header of 0 bytes": joined(b"", BODY),
        "a header of 2^63 bytes": joined(HEADER, BODY, size=1 << 63),
        "a header longer than the file": joined(HEADER, BODY, size=len(GOOD)),
        "a header cut short": joined(HEADER, BODY, size=len(HEADER) - 1),
        "a header over its limit": joined(HEADER[:-1] + b" " * (64 * 1024) + b"}", BODY),
        "no JSON": joined(b"{" + b"x" * 50, BODY),
        "a leading space": joined(b" " + HEADER, BODY),
        "a byte order mark": joined(b"\xef\xbb\xbf" + HEADER, BODY),
        "UTF-16": joined(HEADER.decode().encode("utf-16"), BODY),
        "invalid UTF-8": joined(HEADER.replace(b"tiny", b"t\xff\xfey"), BODY),
        "a list": joined(b"[]", BODY),
        "NaN": joined(HEADER.replace(b'"shape":[2', b'"shape":[NaN', 1), BODY),
        "a duplicate key": joined(duplicate, BODY),
        "an extra field": tensor(KEY, surprise=1),
        "an extra tensor": edited(lambda h: h.update(x={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
        "a missing tensor": edited(lambda h: h.pop(KEY)),
        "no tensors": edited(lambda h: [h.pop(name) for name in list(h) if name != "__metadata__"]),
        "a path for a name": joined(HEADER.replace(b"encoder.prefix.key", b"../../etc/passwd\\u0000"), BODY),
        "a name of 60 kB": edited(lambda h: h.update({"n" * 60_000: h.pop(KEY)})),
        "overlapping tensors": tensor(KEY, data_offsets=[0, 4096]),
        "a hole": edited(lambda h: None, lambda body: body + bytes(64)),
        "trailing bytes": GOOD + b"trailing",
        "the last byte missing": GOOD[:-1],
        "backward offsets": tensor(KEY, data_offsets=[4096, 0]),
        "offsets of 2^62": tensor(KEY, data_offsets=[0, 1 << 62]),
        "a shape of 2^62": tensor(KEY, shape=[0, 1 << 62, 1, 1]),
        "a negative shape": tensor(KEY, shape=[-2, 2, 4, 32]),
        "a true shape": tensor(KEY, shape=[True, 2, 4, 32]),
        "rank 0": tensor(KEY, shape=[]),
        "rank 200": tensor(KEY, shape=[1] * 200),
        "transposed": tensor(KEY, shape=[2, 4, 2, 32]),
        "sides swapped": edited(swapped_names),
        "F64": tensor(KEY, dtype="F64"),
        "F8": tensor(KEY, dtype="F8_E4M3"),
        "F4": tensor(KEY, dtype="F4"),
        "two types": tensor(KEY, dtype="BF16"),
        "no metadata": edited(lambda h: h.pop("__metadata__")),
        "other metadata": edited(lambda h: h["__metadata__"].update(more="x")),
        "metadata that is no text": edited(lambda h: h["__metadata__"].update(promptmux=[1])),
        "a manifest of another schema": manifest(schema=99),
        "a manifest of another length": manifest(encoder_length=5),
        "a manifest of absurd length": manifest(encoder_length=1 << 40),
        "a manifest with unknown keys": manifest(surprise=1),
        "a manifest without a kind": manifest(kind=None),
        "a name that is a path": manifest(name="../target"),
        "half a character": manifest(instruction=" \ud800 {text}"),
        "deep nesting": manifest(provenance=json.loads('{"a":' * 40 + "1" + "}" * 40)),
        "a canary that is none": manifest(canary=[{"tokens": "x"}]),
        "not a number": cast(torch.float32)[:-4] + b"\x00\x00\xc0\x7f",
        "infinite": cast(torch.float32)[:-4] + b"\x00\x00\x80\x7f",
        "half floats without end": cast(torch.float16)[:-2] + b"\x00\x7c",
        "absurdly large": cast(torch.float32)[:-4] + b"\x00\x00\x7f\x7f",
        "100,000 empty tensors": empty_tensors(100_000),
        "1,000 empty tensors": empty_tensors(1000),
        "a pickle": pickle.dumps({"weights": [1.0] * 100}),
        "a zip": zipped(),
        "a gzip": gzip.compress(GOOD),
        "HTML": b"<!doctype html><html><body>log in</body></html>",
    }


def mutated(rng: random.Random) -> bytes:
    """A good file with a few bytes flipped, cut, doubled, moved or overwritten, most of them in its header."""
    data = bytearray(GOOD)
    for _ in range(rng.randint(1, 3)):
        end = len(HEADER) + 8 if rng.random() < 0.8 else len(data)
        place, length = rng.randrange(min(end, len(data))), rng.randint(1, 40)
        kind = rng.randrange(6)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + length]
        elif kind == 2:
            data[place:place] = data[place : place + length]
        elif kind == 3:
            other = rng.randrange(len(data))
            data[place : place + length] = data[other : other + length]
        elif kind == 4:
            data[:8] = rng.choice([0, 1, 2**31, 2**63, len(data), len(HEADER) + rng.randint(-9, 9)]).to_bytes(
                8, "little"
            )
        else:
            data[place : place + length] = rng.randbytes(length)
    return bytes(data)
