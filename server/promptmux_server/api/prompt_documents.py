"""Published versions as answers: how they are written, and how `/openapi.json` documents them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from promptmux_server.api.documents import FAILURES, Document
from promptmux_server.engine.publications import PromptVersion


class PublishedVersion(Document):
    """One version of one prompt. `sha256` is of its content, as in answers; `file_sha256` of the file's bytes."""

    name: str
    version: int
    sha256: str
    file_sha256: str
    bytes: int
    encoder_length: int
    decoder_length: int
    created: str
    author: str
    current: bool
    pinned: bool


class DescribedVersion(PublishedVersion):
    """The same with everything that its file says of the task."""

    manifest: dict[str, Any]


class PromptPage(Document):
    """What names stand for, by name; `next` is the last of them if more follow, to be sent as `after`."""

    prompts: list[PublishedVersion]
    next: str | None


class VersionList(Document):
    """Versions that a name keeps, newest first; `current` is the one it stands for."""

    name: str
    current: int | None
    versions: list[PublishedVersion]


FILE = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

TAKES_FILE = {"requestBody": {"required": True, **FILE}}
SENDS_FILE: dict[int | str, dict[str, Any]] = {200: FILE, **FAILURES}
CREATES: dict[int | str, dict[str, Any]] = {
    201: {"model": DescribedVersion},
    200: {"model": DescribedVersion, "description": "The name stood for this content already."},
    **FAILURES,
}
DELETES: dict[int | str, dict[str, Any]] = {204: {"description": "The name stands for nothing."}, **FAILURES}


def version_document(version: PromptVersion) -> dict[str, Any]:
    """A version as JSON."""
    written = asdict(version.record) | {"current": version.current, "pinned": version.pinned}
    if version.manifest is not None:
        written["manifest"] = json.loads(version.manifest.to_json())
    return written


def etag(version: PromptVersion) -> dict[str, str]:
    return {"ETag": f'"{version.record.version}"'}
