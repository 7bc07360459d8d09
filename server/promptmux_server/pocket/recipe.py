"""What `pocket` is made of: its shape, the numbers of its pretraining, initial weights. Knows no data and no loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.layers import DecoderLayer, EncoderLayer
from promptmux_server.backbone.model import OFA

NUM_BINS = 128
"""Location symbols: one a pixel."""


def pocket_config(text_vocab_size: int) -> BackboneConfig:
    """OFA at 6.3 M parameters: 128 px in 64 patches, four layers a side, a stem half as wide as the released one."""
    return BackboneConfig(
        name="pocket",
        vocab_size=text_vocab_size + NUM_BINS,
        d_model=192,
        ffn_dim=768,
        heads=3,
        encoder_layers=4,
        decoder_layers=4,
        resnet_blocks=(2, 2, 4),
        resnet_width=32,
        image_bucket_size=8,
        token_bucket_size=64,
        max_positions=256,
        num_codes=0,
        num_bins=NUM_BINS,
        max_image_size=128,
        image_size=128,
        orig_patch_image_size=128,
        dropout=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Pretraining behind a frozen stem: one step asks `texts` questions of each of `images` pictures."""

    steps: int = 2600
    images: int = 16
    texts: int = 5
    described_steps: int = 300
    """Until then every picture is described whole in each step; after that, once it can be, questions take the room."""
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    smoothing: float = 0.0
    seed: int = 20261125

    def rate(self, step: int) -> float:
        """Learning rate of a step (from 0): linear warm-up, then linear decay to zero."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warm * max(0.0, 1.0 - step / self.steps)


def initialise(model: nn.Module) -> None:
    """Initial weights: embeddings N(0, 0.02) as OFA has it, linear layers N(0, 1 / fan-in), convolutions He's.

    OFA's 0.02 everywhere leaves attention at this width almost uniform, and learning on a plateau (docs/log.md).
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def begin_by_matching(model: OFA) -> None:
    """Start attention as what it must become anyway: like finds like, and what is found is copied.

    Encoder keys begin equal to queries, so a word attends to the patches that show it; values and outputs of encoder
    and cross-attention begin as an orthogonal matrix and its transpose (after Trockman and Kolter 2023, "Mimetic
    initialization of self-attention layers", who find both in trained transformers). Location symbols begin as waves
    of their position, so that near places look alike.
    """
    copying = [cast(EncoderLayer, layer).self_attn for layer in model.encoder.layers]
    for attention in copying:
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
    copying += [cast(DecoderLayer, layer).encoder_attn for layer in model.decoder.layers]
    for attention in copying:
        nn.init.orthogonal_(attention.v_proj.weight)
        attention.out_proj.weight.data.copy_(attention.v_proj.weight.T)
    first = model.config.first_bin_id
    model.encoder.embed_tokens.weight.data[first:] = 0.02 * place_waves(torch.arange(NUM_BINS), model.config.d_model)
    nn.init.normal_(model.encoder.type_embedding.weight, std=0.005)


def place_waves(places: Tensor, width: int) -> Tensor:
    """Places in pixels (n,) -> (n, width) sines and cosines of mean square 1, wavelengths from 12 to 512 pixels."""
    wavelengths = 12.0 * (512.0 / 12.0) ** (torch.arange(width // 2) / (width // 2 - 1))
    angles = 2 * torch.pi * places.float()[:, None] / wavelengths
    return torch.cat([angles.sin(), angles.cos()], 1) * 2**0.5
