"""What the server says of the versions of its prompts. Fields that a newer server adds are ignored."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict


class PromptVersion(BaseModel):
    """One published version: it never changes, and its number is never given to another."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    version: int
    sha256: str
    """Of the content, tensors and manifest: the one in `Answer.prompt`."""
    file_sha256: str
    """Of the file's bytes."""
    bytes: int
    encoder_length: int
    decoder_length: int
    created: datetime
    author: str
    """Name of the key that published it; `seed` for a file that the server was started with."""
    current: bool = False
    """Whether its name stands for this version now."""
    pinned: bool = False
    manifest: dict[str, Any] | None = None
    """Kind, backbone, metric, provenance and the rest; None in lists."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"
