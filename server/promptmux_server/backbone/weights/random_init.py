"""Random weights of any size, for tests and benchmarks of what does not depend on their values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.weights.names import expected_shapes


def random_backbone(config: BackboneConfig, *, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Canonical tensors: N(0, 0.02), convolutions scaled by fan-in, norms and head scales at one, biases at zero."""
    generator = torch.Generator().manual_seed(seed)

    def make(name: str, shape: torch.Size) -> Tensor:
        if name.endswith(("c_attn", "running_var")) or (name.endswith("weight") and len(shape) == 1):
            return torch.ones(shape, dtype=dtype)
        if len(shape) == 1:
            return torch.zeros(shape, dtype=dtype)
        std = math.sqrt(2.0 / math.prod(shape[1:])) if len(shape) == 4 else 0.02
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    return {name: make(name, shape) for name, shape in expected_shapes(config).items()}
