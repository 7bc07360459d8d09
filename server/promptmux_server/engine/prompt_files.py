"""Prompt files as one backbone takes them, in the one type that it serves.

Owns what a file must fit. Knows nothing of who published it, who serves it or where it lies in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from promptmux_prompts import (
    Manifest,
    Prompt,
    PromptShape,
    Refusal,
    Seed,
    load_manifest,
    load_prompt,
    read_prompt,
    read_seeds,
)
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.engine.prompt_versions import PromptSource


@dataclass(frozen=True)
class PromptFiles:
    """What every file must fit."""

    shape: PromptShape
    fingerprint: str
    dtype: torch.dtype
    """That prompts are served in."""

    @classmethod
    def of(cls, config: BackboneConfig, fingerprint: str, dtype: torch.dtype) -> PromptFiles:
        shape = PromptShape(config.encoder_layers, config.decoder_layers, config.heads, config.head_dim)
        return cls(shape, fingerprint, dtype)

    def seeds(self, directory: Path) -> Iterator[Seed | Refusal]:
        """Every file of a directory, one at a time."""
        return read_seeds(directory, shape=self.shape, fingerprint=self.fingerprint, dtype=self.dtype)

    def check(self, data: bytes) -> Prompt:
        """The prompt of a whole file; raises PromptFileError."""
        return read_prompt(data, shape=self.shape, fingerprint=self.fingerprint, dtype=self.dtype)

    def source(self, digest: str, path: Path, encoder_length: int, decoder_length: int) -> PromptSource:
        """Where a version can be read, and how much of it there is."""
        positions = self.shape.encoder_layers * encoder_length + self.shape.decoder_layers * decoder_length
        size = 2 * positions * self.shape.heads * self.shape.head_dim * self.dtype.itemsize
        return PromptSource(digest, path, encoder_length, decoder_length, size)

    def manifest(self, source: PromptSource) -> Manifest:
        """A version's manifest, without its tensors; raises OSError or PromptFileError."""
        return load_manifest(source.path, shape=self.shape, fingerprint=self.fingerprint)

    def read(self, source: PromptSource) -> Prompt:
        """A version from its file; raises OSError or PromptFileError, also for a file that holds another one."""
        return load_prompt(
            source.path, shape=self.shape, fingerprint=self.fingerprint, dtype=self.dtype, sha256=source.digest
        )
