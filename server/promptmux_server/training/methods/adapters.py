"""Bottleneck adapters behind every feed-forward network (Houlsby et al. 2019; ofa-spec 5.2), the backbone truly frozen.

A deviation from the release, whose flag for adapters alone leaves nearly everything trainable.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from promptmux_server.backbone.model import OFA
from promptmux_server.training.initial import NOISE
from promptmux_server.training.methods.twin import twin
from promptmux_server.training.methods.weights import TrainedWeights

RELEASED_WIDTH = 100
"""Of the scripts' bottleneck: about as many parameters as prompts of length 100."""


class Adapters(TrainedWeights):
    """Adapters in a model that shares all else with the frozen backbone."""

    def __init__(self, model: OFA, *, seed: int, width: int = RELEASED_WIDTH) -> None:
        """Raises ValueError for a backbone that has adapters of its own."""
        if model.config.adapter_dim is not None:
            raise ValueError("the backbone has adapters already")
        config = replace(model.config, adapter_dim=width)
        generator = torch.Generator().manual_seed(seed)
        layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
        shapes = {"down_proj.weight": (width, config.d_model), "down_proj.bias": (width,)}
        shapes |= {"up_proj.weight": (config.d_model, width), "up_proj.bias": (config.d_model,)}
        fresh = {}
        for side, count in layers.items():
            for index in range(count):
                for part, shape in shapes.items():
                    value = torch.zeros(shape) if part.endswith("bias") else _noise(shape, generator)
                    fresh[f"{side}.layers.{index}.adapter.{part}"] = value.to(model.device)
        super().__init__(twin(config, model.state_dict() | fresh, folded=model.folded), fresh, needs_pixels=False)


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Not quite an identity at the start, as released."""
    return torch.randn(shape, generator=generator) * NOISE
