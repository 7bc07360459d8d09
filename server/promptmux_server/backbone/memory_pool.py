"""Cross-attention keys and values of many requests, which come and go one by one, on one axis of places.

Owns the tensors, of a fixed size from the start; who holds which places is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from promptmux_kernels import CrossMemory, Rows, pack_memory
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.decoder import Memory
from promptmux_server.backbone.positions import Grid


class MemoryPool:
    """All decoder layers' memory: `places` token positions each."""

    def __init__(self, config: BackboneConfig, places: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._layers = []
        for _ in range(config.decoder_layers):
            sample = _sample(config, dtype, device)
            shape = (places, config.heads, config.head_dim)
            self._layers.append((sample.key.new_empty(shape), sample.value.new_empty(shape)))
        self._layout = sample.layout

    @staticmethod
    def bytes_per_place(config: BackboneConfig, dtype: torch.dtype, device: torch.device) -> int:
        """As this device packs memory, which may be wider than `dtype`."""
        return 2 * config.decoder_layers * config.d_model * _sample(config, dtype, device).key.element_size()

    def keep(self, memory: Memory, starts: Sequence[int]) -> None:
        """Copy row r of a memory just made to the places from `starts[r]` on."""
        for (key, value), fresh in zip(self._layers, memory.layers, strict=True):
            assert fresh.layout == self._layout
            for row, start in enumerate(starts):
                span = fresh.span(row)
                places = slice(start, start + span.stop - span.start)
                key[places], value[places] = fresh.key[span], fresh.value[span]

    def view(self, starts: Sequence[int], lengths: Sequence[int], grids: Sequence[Grid]) -> Memory:
        """The memory of some requests, without a copy."""
        rows = Rows(tuple(starts), tuple(lengths))
        return Memory(tuple(CrossMemory(key, value, rows, self._layout) for key, value in self._layers), tuple(grids))


def _sample(config: BackboneConfig, dtype: torch.dtype, device: torch.device) -> CrossMemory:
    """One place as this device packs it."""
    one = torch.zeros(1, config.heads, config.head_dim, dtype=dtype, device=device)
    with torch.no_grad():  # else it would be packed as training reads it
        return pack_memory(one, one, Rows.packed([1]))
