"""What a picture is known by once the stem has seen it: pixels, preparation and, between processes, the model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class ImageKey:
    """All that the stem's output depends on, besides the model: decoded pixels and how they are prepared."""

    digest: str
    size: int
    mean: float
    std: float
    alone: bool = False
    """Seen in a pass of its own: the same bits whatever pictures others send."""

    def of_model(self, fingerprint: str, dtype: str) -> str:
        """A key that names the model too, for what outlives a process: sha256 over everything."""
        text = f"{self.digest} {self.size} {self.mean!r} {self.std!r} {self.alone} {fingerprint} {dtype}"
        return hashlib.sha256(text.encode()).hexdigest()
