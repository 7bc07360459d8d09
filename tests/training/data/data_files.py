"""Small data files of every format, and the tasks that read them on the tiny backbone."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import tiny
from promptmux_prompts import ImageInput, Kind
from promptmux_server.tasks import TaskSpec
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.manifests import bare_manifest
from promptmux_server.training.data.source import Source, SourceConfig, open_source
from promptmux_server.training.data.survey import Survey, survey

WIDTH, HEIGHT = 40, 20
"""Of every picture, in pixels."""


def picture(seed: int = 0, form: str = "PNG") -> bytes:
    """A picture file of noise."""
    rgb = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, form)
    return buffer.getvalue()


def pictures(folder: Path, count: int) -> Path:
    """A folder of `0.png`, `1.png`, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder


def standard(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url_safe(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any] | str]) -> Path:
    """Objects as JSON, texts as they are."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def write_tsv(path: Path, rows: Iterable[Sequence[str]]) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def encoder(kind: Kind, **manifest: Any) -> SampleEncoder:
    """A task of a kind on the tiny backbone, whose pictures are 64 px."""
    described = bare_manifest("task", kind, tiny.backbone(), **manifest)
    assert described.image is None or described.image == ImageInput(64)
    return SampleEncoder(TaskSpec.from_manifest(described, tiny.config()), tiny.tokenizer())


def opened(path: Path, kind: Kind, **config: Any) -> Source:
    """The source of a file, its indices beside it."""
    premise = bool(config.pop("premise", False))
    return open_source(SourceConfig(path=path, **config), kind, path.parent / "cache", premise=premise)


def surveyed(path: Path, task: SampleEncoder, **config: Any) -> Survey:
    found = opened(path, task.spec.kind, **config)
    return survey(found, task, path.parent / "cache")


def numbered(folder: Path, count: int, name: str = "data.jsonl") -> Path:
    """A file of texts without pictures: number i asks "i" and answers "one"."""
    path = folder / name
    lines = [json.dumps({"text": f"{i}", "answer": "one"}) + "\n" for i in range(count)]
    if not path.exists() or path.read_text() != "".join(lines):  # a file that is being read must not be touched
        path.write_text("".join(lines))
    return path
