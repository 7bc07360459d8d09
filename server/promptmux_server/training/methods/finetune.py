"""Full fine-tuning: every weight learns. The yardstick that prompts are measured against, and the only whole copy."""

from __future__ import annotations

import torch

from promptmux_server.backbone.vision import channels_last
from promptmux_server.backbone.weights import LoadedBackbone
from promptmux_server.training.methods.twin import twin
from promptmux_server.training.methods.weights import TrainedWeights


class FineTuning(TrainedWeights):
    """All weights of a copy of the backbone. Batch normalisation keeps its statistics; its scales and shifts learn."""

    def __init__(self, loaded: LoadedBackbone, device: torch.device | str = "cpu") -> None:
        model = twin(
            loaded.config,
            {name: tensor.to(device, torch.float32) for name, tensor in loaded.tensors.items()},
            folded=False,
        )
        names = [name for name, _ in model.named_parameters()]
        super().__init__(model, names, needs_pixels=True)
        channels_last(model.encoder.embed_images)
