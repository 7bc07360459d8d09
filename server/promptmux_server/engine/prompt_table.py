"""Which prompts are resident, and where: names to immutable versions, versions to pages of the device's pools.

Owns the pools. A batch asks for its rows' pages by digest; a name is looked up once, at admission. Knows nothing of
files (`promptmux_prompts` reads them) or of what a task does with its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from promptmux_kernels import PAGE, PromptBatch
from promptmux_kernels.rows import to_pages
from promptmux_prompts import Prompt
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.engine.runner import BatchPrompts


@dataclass(frozen=True)
class Residence:
    """Pages of one prompt version in the encoder's and the decoder's pool, and its lengths there."""

    encoder_pages: tuple[int, ...]
    decoder_pages: tuple[int, ...]
    encoder_length: int
    decoder_length: int


NO_PROMPT = Residence((), (), 0, 0)
"""The backbone alone: no prompt on either side."""


class PagePool:
    """Pages of prompt K and V of one side, (L, pages, H, PAGE, D) each; grows by doubling, zeroes what is freed."""

    def __init__(self, layers: int, config: BackboneConfig, dtype: torch.dtype, device: torch.device) -> None:
        key = torch.zeros(layers, 1, config.heads, PAGE, config.head_dim, dtype=dtype, device=device)
        self._pools = (key, torch.zeros_like(key))
        """K and V as one value: a batch built while another thread lets the pool grow must see both or neither."""
        self._free = [0]

    @property
    def key(self) -> Tensor:
        return self._pools[0]

    @property
    def value(self) -> Tensor:
        return self._pools[1]

    @property
    def used(self) -> int:
        return self.key.shape[1] - len(self._free)

    def store(self, key: Tensor, value: Tensor) -> tuple[int, ...]:
        """Copy a prompt (L, H, P, D) into free pages and return their numbers in order."""
        pages_key, pages_value = to_pages(key), to_pages(value)
        count = pages_key.shape[1]
        while len(self._free) < count:
            self._grow()
        pages = tuple(self._free.pop() for _ in range(count))
        if pages:
            index = list(pages)
            self.key[:, index] = pages_key.to(self.key)
            self.value[:, index] = pages_value.to(self.value)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        index = list(pages)
        self.key[:, index] = 0
        self.value[:, index] = 0
        self._free.extend(pages)

    def _grow(self) -> None:
        pages = self.key.shape[1]
        key, value = (torch.cat([pool, torch.zeros_like(pool)], dim=1) for pool in self._pools)
        self._pools = (key, value)
        self._free.extend(range(2 * pages - 1, pages - 1, -1))

    def batch(self, rows: Sequence[tuple[tuple[int, ...], int]]) -> PromptBatch:
        """The pool as a batch reads it: (pages, length) of each row."""
        key, value = self._pools
        width = max(1, *(len(pages) for pages, _ in rows))
        table = torch.tensor([[*pages, *(0,) * (width - len(pages))] for pages, _ in rows], device=key.device)
        return PromptBatch(key, value, table, tuple(length for _, length in rows))


class PromptPools:
    """Both sides' pools of one backbone."""

    def __init__(self, config: BackboneConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.encoder = PagePool(config.encoder_layers, config, dtype, device)
        self.decoder = PagePool(config.decoder_layers, config, dtype, device)

    def store(self, prompt: Prompt) -> Residence:
        return Residence(
            encoder_pages=self.encoder.store(prompt.encoder_key, prompt.encoder_value),
            decoder_pages=self.decoder.store(prompt.decoder_key, prompt.decoder_value),
            encoder_length=prompt.encoder_key.shape[2],
            decoder_length=prompt.decoder_key.shape[2],
        )

    def free(self, residence: Residence) -> None:
        self.encoder.free(residence.encoder_pages)
        self.decoder.free(residence.decoder_pages)

    def batch(self, rows: Sequence[Residence]) -> BatchPrompts:
        """Prompts of a batch whose row b reads `rows[b]`."""
        return BatchPrompts(
            encoder=self.encoder.batch([(row.encoder_pages, row.encoder_length) for row in rows]),
            decoder=self.decoder.batch([(row.decoder_pages, row.decoder_length) for row in rows]),
        )
