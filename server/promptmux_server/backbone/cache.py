"""Keys and values of decoded tokens, one slot per token; prompts never enter.

Beams are reordered by naming other slots, never by moving them. Slots belong to one batch and are handed out once; the
cache grows by doubling and is dropped with its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from promptmux_kernels import write_cache


class DecodeCache:
    """`key` and `value` are (L, slots, H, D)."""

    def __init__(self, layers: int, heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.key = torch.zeros(layers, 64, heads, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)
        self._used = 0

    def allocate(self, count: int) -> Tensor:
        """Hand out `count` new slots, (count,) int64."""
        while self._used + count > self.key.shape[1]:
            self.key = torch.cat([self.key, torch.zeros_like(self.key)], dim=1)
            self.value = torch.cat([self.value, torch.zeros_like(self.value)], dim=1)
        slots = torch.arange(self._used, self._used + count, device=self.key.device)
        self._used += count
        return slots

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values (T, H, D) of new tokens at `slots` (T,)."""
        write_cache(self.key[layer], self.value[layer], slots, key, value)
