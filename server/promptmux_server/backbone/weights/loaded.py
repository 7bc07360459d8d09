"""A backbone in memory, before it becomes a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from promptmux_server.backbone.config import BackboneConfig


@dataclass(frozen=True)
class LoadedBackbone:
    """Configuration, canonical tensors (batch normalisation unfolded) and where its tokenizer's files are."""

    config: BackboneConfig
    tensors: Mapping[str, Tensor]
    tokenizer_dir: Path | None = None
    """None: the format carries no tokenizer."""
    dropped: tuple[str, ...] = ()
    """Names in the file that text generation does not need."""
    prompts: Mapping[str, Tensor] = field(default_factory=dict)
    """Prompt generator tensors that a fairseq checkpoint carries, by fairseq name."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over name, type, shape and bytes of every tensor: two backbones with equal prints are the same."""
        sha = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()
