"""The prompt files of one directory, as one backbone takes them in one type.

Owns how a version is found again on disk. Knows nothing of who serves it or where it lies in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from promptmux_prompts import Prompt, PromptShape, Refusal, load_prompt, prompt_path, scan_directory
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.engine.prompt_host import prompt_bytes
from promptmux_server.engine.prompt_versions import PromptSource


@dataclass(frozen=True)
class PromptFiles:
    """A directory, and what its files must fit."""

    directory: Path
    shape: PromptShape
    fingerprint: str
    dtype: torch.dtype
    """That prompts are served in."""

    @classmethod
    def of(cls, directory: Path, config: BackboneConfig, fingerprint: str, dtype: torch.dtype) -> PromptFiles:
        shape = PromptShape(config.encoder_layers, config.decoder_layers, config.heads, config.head_dim)
        return cls(directory, shape, fingerprint, dtype)

    def scan(self) -> Iterator[Prompt | Refusal]:
        """Every file, one at a time."""
        return scan_directory(self.directory, shape=self.shape, fingerprint=self.fingerprint, dtype=self.dtype)

    def source(self, prompt: Prompt) -> PromptSource:
        """Where a prompt of the directory can be read again."""
        return PromptSource(
            digest=prompt.digest,
            path=prompt_path(self.directory, prompt.manifest.name),
            encoder_length=prompt.encoder_key.shape[2],
            decoder_length=prompt.decoder_key.shape[2],
            bytes=prompt_bytes(prompt),
        )

    def read(self, source: PromptSource) -> Prompt:
        """A version from its file; raises OSError or PromptFileError, also if another version took its place."""
        return load_prompt(
            source.path, shape=self.shape, fingerprint=self.fingerprint, dtype=self.dtype, sha256=source.digest
        )
