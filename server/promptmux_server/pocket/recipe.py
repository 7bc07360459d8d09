"""What `pocket` is made of: its shape, the numbers of its pretraining, initial weights. Knows no data and no loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.vision import Bottleneck

NUM_BINS = 128
"""Location symbols: one a pixel."""
STEM = "encoder.embed_images."
"""What the names of the stem's weights begin with in a backbone."""


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
    """Pretraining: one step asks `texts` questions of each of `images` pictures, so that the stem is shared."""

    steps: int = 6000
    images: int = 16
    texts: int = 6
    learning_rate: float = 5e-4
    warmup_steps: int = 100
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    seed: int = 20261125

    def rate(self, step: int) -> float:
        """Learning rate of a step (from 0): linear warm-up, then linear decay to zero."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warm * max(0.0, 1.0 - step / self.steps)


def initialise(model: nn.Module) -> None:
    """Initial weights: embeddings N(0, 0.02) as OFA has it, linear layers N(0, 1 / fan-in), convolutions He's, and
    blocks of the stem that begin by changing nothing.

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
        elif isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.get_parameter("weight"))
