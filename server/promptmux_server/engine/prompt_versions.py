"""The nouns of the prompt tiers: where a version comes from, what it is doing, and one request's claim on it.

Owns their fields and what follows from them alone. `prompt_tiers` sets every field, under its lock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from promptmux_server.engine.prompt_table import Pages, Residence
from promptmux_server.errors import PromptmuxError


@dataclass(frozen=True)
class PromptSource:
    """An immutable prompt version and the file that held it when the directory was read."""

    digest: str
    path: Path
    encoder_length: int
    decoder_length: int
    bytes: int
    """Of its tensors, in the type they are served in."""


@dataclass(eq=False)
class Version:
    """What the tiers know of one version."""

    source: PromptSource
    served: bool = True
    """A name stands for it; else it lives until its last request ends."""
    lost: bool = False
    """Its file no longer holds it: what is in memory is all there is."""
    held: int = 0
    """Requests that may read its pages now."""
    waiting: dict[int, Lease | None] = field(default_factory=dict)
    """Claims by their number, oldest first, that were not given the pages yet; None is a pin's."""
    home: Residence | None = None
    """Its pages on the device."""
    written: torch.cuda.Event | None = None
    """On a GPU: passed once the pages are filled."""

    @property
    def in_use(self) -> bool:
        return self.held > 0 or bool(self.waiting)

    @property
    def oldest(self) -> int:
        """Number of the claim that has waited longest; there must be one."""
        return next(iter(self.waiting))

    @property
    def pages(self) -> Pages:
        return Pages.of(self.source.encoder_length, self.source.decoder_length)


@dataclass(eq=False)
class Lease:
    """One request's claim on a version, from admission to its end."""

    version: Version
    number: int
    """Claims are numbered in order of admission."""
    since: float
    """`time.monotonic()` seconds."""
    residence: Residence | None = None
    """The pages that it may read, from `hold` to `release`."""
    error: PromptmuxError | None = None
    """Why the version could not be loaded."""
    ended: bool = False
