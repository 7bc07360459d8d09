"""The shape of one OFA backbone, as a frozen value.

Owns every number that decides the forward pass or the vocabulary layout, and its JSON form (`config.json` of a
backbone directory). Knows nothing of tensors, files or tasks.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

BOS, PAD, EOS, UNK = 0, 1, 2, 3

RESNET_BLOCKS: dict[str, tuple[int, int, int]] = {
    "resnet18": (2, 2, 2),
    "resnet34": (3, 4, 6),
    "resnet50": (3, 4, 6),
    "resnet101": (3, 4, 23),
    "resnet152": (3, 8, 36),
}
"""Bottleneck blocks of the three stages that OFA uses, by its `resnet_type` name."""


class ConfigError(ValueError):
    """A backbone configuration that cannot describe an OFA model; the message names the field."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Hyper-parameters of an OFA model; the defaults are those common to all released sizes."""

    name: str
    vocab_size: int
    d_model: int
    ffn_dim: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    resnet_blocks: tuple[int, int, int]
    resnet_width: int = 64
    """Channels after the stem convolution; the three stages end with 4, 8 and 16 times as many."""
    image_bucket_size: int = 42
    """Side of the largest patch grid that has its own positions."""
    token_bucket_size: int = 256
    max_positions: int = 1024
    num_codes: int = 8192
    num_bins: int = 1000
    max_image_size: int = 512
    """The pixel range that the location bins span, whatever the size of the image fed to the model."""
    image_size: int = 480
    """Side in pixels of the square image fed to the model unless a prompt says otherwise."""
    orig_patch_image_size: int = 256
    interpolate_position: bool = False
    attn_scale_factor: float = 2.0
    adapter_dim: int | None = None
    image_mean: float = 0.5
    image_std: float = 0.5
    dropout: float = 0.1
    encoder_drop_path: float = 0.0
    decoder_drop_path: float = 0.0

    def __post_init__(self) -> None:
        for field in ("vocab_size", "d_model", "ffn_dim", "heads", "encoder_layers", "decoder_layers", "max_positions"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.d_model % self.heads:
            raise ConfigError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        if len(self.resnet_blocks) != 3 or min(self.resnet_blocks) < 1:
            raise ConfigError(f"resnet_blocks must be three positive numbers, got {self.resnet_blocks}")
        if self.text_vocab_size < 4:
            raise ConfigError("vocab_size leaves no room for text beside num_codes and num_bins")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def text_vocab_size(self) -> int:
        """Ids below this are text, special symbols included."""
        return self.vocab_size - self.num_codes - self.num_bins

    @property
    def first_code_id(self) -> int:
        return self.text_vocab_size

    @property
    def first_bin_id(self) -> int:
        return self.text_vocab_size + self.num_codes

    @property
    def image_feature_dim(self) -> int:
        """Channels that leave the vision stem."""
        return 16 * self.resnet_width

    @property
    def patch_pixels(self) -> int:
        """Total stride of the vision stem in pixels."""
        return 16

    def patches(self, side: int) -> int:
        """Rows or columns of image tokens that a picture's side in pixels becomes."""
        return -(-side // self.patch_pixels)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse `config.json`; raises ConfigError for anything that is not exactly this configuration."""
        try:
            raw: Any = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"config.json is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError("config.json must hold one object")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(raw.keys() - known):
            raise ConfigError(f"unknown keys in config.json: {', '.join(unknown)}")
        if isinstance(raw.get("resnet_blocks"), list):
            raw["resnet_blocks"] = tuple(raw["resnet_blocks"])
        try:
            return cls(**raw)
        except TypeError as error:
            raise ConfigError(f"config.json does not describe a backbone: {error}") from error
