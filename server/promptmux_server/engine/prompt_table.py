"""Where prompts lie on the device: pools of pages, of a size that is fixed when the server starts.

Owns the pages and their accounts. A batch asks for its rows' pages; what they mean, and which version goes when room is
short, is `prompt_tiers`'s. Pages are handed out and taken back by one thread, while others read those they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from promptmux_kernels import PAGE, PromptBatch
from promptmux_kernels.rows import to_pages
from promptmux_prompts import Prompt
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.engine.runner import BatchPrompts

DEFAULT_PROMPTS = 64
DEFAULT_LENGTH = 100
"""By default there is room for 64 prompts of 100 positions on either side, the longest in the literature on OFA."""


@dataclass(frozen=True)
class Residence:
    """Pages of one prompt version in the encoder's and the decoder's pool, its lengths there, and its layers."""

    encoder_pages: tuple[int, ...]
    decoder_pages: tuple[int, ...]
    encoder_length: int
    decoder_length: int
    encoder_layers: range | None = None
    """None: all of them. Said by the prompt, so not before it is at hand."""
    decoder_layers: range | None = None

    def of(self, prompt: Prompt) -> Residence:
        """The same pages, for this prompt's layers."""
        encoder, decoder = prompt.manifest.encoder_layers, prompt.manifest.decoder_layers
        return replace(self, encoder_layers=encoder and range(*encoder), decoder_layers=decoder and range(*decoder))


NO_PROMPT = Residence((), (), 0, 0)
"""The backbone alone: no prompt on either side."""


@dataclass(frozen=True)
class Pages:
    """A number of pages on either side of the backbone."""

    encoder: int
    decoder: int

    @classmethod
    def of(cls, encoder_length: int, decoder_length: int) -> Pages:
        """What a prompt of these lengths takes."""
        return cls(-(-encoder_length // PAGE), -(-decoder_length // PAGE))

    def __add__(self, other: Pages) -> Pages:
        return Pages(self.encoder + other.encoder, self.decoder + other.decoder)

    def covers(self, need: Pages) -> bool:
        return self.encoder >= need.encoder and self.decoder >= need.decoder


class PagePool:
    """Prompt K and V of one side, (L, 1 + pages, H, PAGE, D) each; page 0 is never handed out and stays zero."""

    def __init__(
        self, layers: int, config: BackboneConfig, pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.key = torch.zeros(layers, 1 + pages, config.heads, PAGE, config.head_dim, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)
        self.total = pages
        self._free = list(range(pages, 0, -1))

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages handed out and not taken back."""
        return self.total - self.free

    @property
    def page_bytes(self) -> int:
        """K and V of one page."""
        return (self.key.nbytes + self.value.nbytes) // (1 + self.total)

    def take(self, count: int) -> tuple[int, ...]:
        """Hand out pages, all zero; the caller has seen that there are so many."""
        assert count <= self.free
        return tuple(self._free.pop() for _ in range(count))

    def write(self, pages: Sequence[int], key: Tensor, value: Tensor) -> None:
        """Copy a prompt (L, H, P, D) into its pages."""
        if pages:
            index = torch.tensor(pages, device=self.key.device)
            for pool, prompt in ((self.key, key), (self.value, value)):
                pool.index_copy_(1, index, to_pages(prompt.to(pool, non_blocking=True)))

    def zero(self, pages: Sequence[int]) -> None:
        """Forget what pages hold, K and V: were they NaN, 0 times NaN would still be NaN in a row that masks them."""
        if pages:
            index = torch.tensor(pages, device=self.key.device)
            for pool in (self.key, self.value):
                pool.index_fill_(1, index, 0)

    def put_back(self, pages: Sequence[int]) -> None:
        """Take back pages that have been zeroed."""
        self._free.extend(pages)

    def batch(self, rows: Sequence[tuple[tuple[int, ...], int, range | None]]) -> PromptBatch:
        """The pool as a batch reads it: (pages, length, layers) of each row."""
        width = max(1, *(len(pages) for pages, _, _ in rows))
        table = torch.tensor([[*pages, *(0,) * (width - len(pages))] for pages, _, _ in rows], device=self.key.device)
        layers = tuple(layers for _, _, layers in rows)
        lengths = tuple(length for _, length, _ in rows)
        return PromptBatch(self.key, self.value, table, lengths, layers if any(layers) else None)


class PromptPools:
    """Both sides' pools of one backbone, as many pages on either side as a budget of bytes has room for.

    A budget too small for any page leaves the backbone alone to be served.
    """

    def __init__(
        self, config: BackboneConfig, dtype: torch.dtype, device: torch.device, budget_bytes: int | None = None
    ) -> None:
        self.budget_bytes = default_bytes(config, dtype) if budget_bytes is None else budget_bytes
        pages = max(0, self.budget_bytes // _pair_bytes(config, dtype) - 1)
        self.encoder = PagePool(config.encoder_layers, config, pages, dtype, device)
        self.decoder = PagePool(config.decoder_layers, config, pages, dtype, device)

    @property
    def total(self) -> Pages:
        return Pages(self.encoder.total, self.decoder.total)

    @property
    def free(self) -> Pages:
        return Pages(self.encoder.free, self.decoder.free)

    @property
    def used_bytes(self) -> int:
        """Of the pages handed out."""
        return self.encoder.used * self.encoder.page_bytes + self.decoder.used * self.decoder.page_bytes

    def take(self, encoder_length: int, decoder_length: int) -> Residence:
        """Pages for a prompt of these lengths; the caller has seen that `free` covers them."""
        need = Pages.of(encoder_length, decoder_length)
        return Residence(
            self.encoder.take(need.encoder), self.decoder.take(need.decoder), encoder_length, decoder_length
        )

    def write(self, home: Residence, prompt: Prompt) -> None:
        self.encoder.write(home.encoder_pages, prompt.encoder_key, prompt.encoder_value)
        self.decoder.write(home.decoder_pages, prompt.decoder_key, prompt.decoder_value)

    def store(self, prompt: Prompt) -> Residence:
        """Take pages for a prompt and fill them; the caller has seen that there are enough."""
        home = self.take(prompt.encoder_key.shape[2], prompt.decoder_key.shape[2]).of(prompt)
        self.write(home, prompt)
        return home

    def zero(self, home: Residence) -> None:
        self.encoder.zero(home.encoder_pages)
        self.decoder.zero(home.decoder_pages)

    def put_back(self, home: Residence) -> None:
        """Take back the pages of a residence that was zeroed."""
        self.encoder.put_back(home.encoder_pages)
        self.decoder.put_back(home.decoder_pages)

    def batch(self, rows: Sequence[Residence]) -> BatchPrompts:
        """Prompts of a batch whose row b reads `rows[b]`."""
        return BatchPrompts(
            encoder=self.encoder.batch([(row.encoder_pages, row.encoder_length, row.encoder_layers) for row in rows]),
            decoder=self.decoder.batch([(row.decoder_pages, row.decoder_length, row.decoder_layers) for row in rows]),
        )


def pool_bytes(config: BackboneConfig, dtype: torch.dtype, pages: int) -> int:
    """The budget that gives pools so many pages on either side, the zero pages included."""
    return (1 + pages) * _pair_bytes(config, dtype)


def default_bytes(config: BackboneConfig, dtype: torch.dtype) -> int:
    """Room for `DEFAULT_PROMPTS` prompts of `DEFAULT_LENGTH` positions on either side."""
    return pool_bytes(config, dtype, DEFAULT_PROMPTS * -(-DEFAULT_LENGTH // PAGE))


def _pair_bytes(config: BackboneConfig, dtype: torch.dtype) -> int:
    """One page of the encoder and one of the decoder, K and V of all layers."""
    return 2 * (config.encoder_layers + config.decoder_layers) * config.heads * PAGE * config.head_dim * dtype.itemsize
