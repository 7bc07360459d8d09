"""From samples in words to training examples in tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from promptmux_server.backbone.config import BOS, EOS, BackboneConfig
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.pocket.samples import Part, pretrain_samples
from promptmux_server.pocket.scenes import Scene
from promptmux_server.training.forward import Example


def to_pixels(images: Tensor) -> Tensor:
    """(B, 128, 128, 3) uint8 -> (B, 3, 128, 128) float32, normalised as `pocket` wants it (mean and std 0.5)."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def part_ids(parts: Sequence[Part], tokenizer: Tokenizer, config: BackboneConfig) -> tuple[int, ...]:
    """Texts as BPE ids, boxes as four location ids; scenes are as large as the model's input, so nothing is scaled."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, str):
            ids += tokenizer.encode(part)
        else:
            span = config.num_bins - 1
            ids += [config.first_bin_id + round(value / config.max_image_size * span) for value in part]
    return tuple(ids)


def training_examples(
    scene: Scene,
    image: int,
    count: int,
    tokenizer: Tokenizer,
    config: BackboneConfig,
    rng: random.Random,
) -> list[Example]:
    """`count` pretraining examples about one scene, which is picture number `image` of its batch."""
    return [
        Example(
            source=(BOS, *part_ids(sample.source, tokenizer, config), EOS),
            prefix=(BOS,),
            target=part_ids(sample.target, tokenizer, config),
            image=image,
        )
        for sample in pretrain_samples(scene, rng, count, described=False)
    ]
