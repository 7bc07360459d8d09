"""What tests of the store share: prompts of a few hundred bytes, and what stands in a store."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from promptmux_prompts import Head, Manifest, Prompt, Store, VersionRecord, write_prompt


@cache
def prompt(number: int) -> Prompt:
    """A whole prompt; each number has its own content."""
    manifest = Manifest.minimal(name="some", backbone_name="b", fingerprint="f", encoder_length=1, decoder_length=0)
    key, nothing = torch.full((1, 1, 1, 8), float(number)), torch.zeros(1, 1, 0, 8)
    return Prompt.build(manifest, key, -key, nothing, nothing.clone())


@cache
def file_of(number: int) -> bytes:
    return write_prompt(prompt(number))


def publish(store: Store, name: str, number: int, **how: Any) -> VersionRecord:
    """The whole way of the prompt of this number into the store."""
    with store.upload() as upload:
        upload.write(file_of(number))
        return store.publish(name, upload, prompt(number), **{"author": "local", **how})


def live(store: Store) -> dict[str, Head]:
    return {head.name: head for head in store.heads() if not head.deleted}


def contents(store: Store) -> dict[str, tuple[int, bytes]]:
    """Version and file that every live name stands for; raises if one of them cannot be read."""
    return {name: (head.version, store.read(store.record(name, head.version))) for name, head in live(store).items()}


def kept(store: Store, name: str) -> dict[int, bytes]:
    """Every version that is listed, each of which must be readable."""
    return {record.version: store.read(record) for record in store.versions(name)}


def blobs(root: Path) -> set[str]:
    return {path.stem for path in (root / "blobs").iterdir()}


def unfinished(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "tmp").iterdir())
