"""Keys and values of decoded tokens, one slot per token; prompts never enter.

Beams are reordered by naming other slots, never by moving them. Of a fixed size from the start; who uses which slot is
the caller's affair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from promptmux_kernels import write_cache
from promptmux_server.backbone.config import BackboneConfig


class DecodeCache:
    """`key` and `value` are (L, slots, H, D)."""

    def __init__(self, config: BackboneConfig, slots: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.decoder_layers, slots, config.heads, config.head_dim)
        self.key = torch.empty(shape, dtype=dtype, device=device)
        self.value = torch.empty_like(self.key)

    @staticmethod
    def bytes_per_slot(config: BackboneConfig, dtype: torch.dtype) -> int:
        return 2 * config.decoder_layers * config.d_model * dtype.itemsize

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values (T, H, D) of new tokens at `slots` (T,)."""
        write_cache(self.key[layer], self.value[layer], slots, key, value)
