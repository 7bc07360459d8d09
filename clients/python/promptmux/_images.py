"""Pictures as base64, from whatever the caller has."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class SavableImage(Protocol):
    """A PIL image, or anything that can write itself as a PNG."""

    def save(self, fp: io.BytesIO, format: str) -> None: ...


ImageSource = str | os.PathLike[str] | bytes | SavableImage


def to_base64(image: ImageSource) -> str:
    """Files and bytes are sent as they are, PIL images as PNG; raises OSError for a file that cannot be read."""
    if isinstance(image, bytes):
        data = image
    elif isinstance(image, str | os.PathLike):
        data = Path(image).read_bytes()
    else:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data = buffer.getvalue()
    return base64.b64encode(data).decode("ascii")
