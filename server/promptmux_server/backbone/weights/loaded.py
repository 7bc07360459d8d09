"""A backbone in memory, before it becomes a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from promptmux_prompts import PromptShape
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.errors import BackboneFileError


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

    @property
    def prompt_shape(self) -> PromptShape:
        """What a prompt must fit."""
        config = self.config
        return PromptShape(config.encoder_layers, config.decoder_layers, config.heads, config.head_dim)

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer's files; raises BackboneFileError where there are none or they do not fit."""
        if self.tokenizer_dir is None:
            raise BackboneFileError("The backbone has no tokenizer: put vocab.json and merges.txt beside its weights.")
        config = self.config
        tokenizer = Tokenizer.load(self.tokenizer_dir, num_codes=config.num_codes, num_bins=config.num_bins)
        if tokenizer.first_bin_id != config.first_bin_id:
            raise BackboneFileError(
                "The tokenizer's vocabulary is not the size that the backbone's configuration says."
            )
        return tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """Two backbones with equal prints are the same."""
        return fingerprint(self.tensors)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, whatever the order."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
