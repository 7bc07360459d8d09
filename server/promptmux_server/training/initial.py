"""Where a prompt may begin: noise, what the backbone itself computes for texts, or other prompts.

Rows of a table are a prompt's positions, and attention does not know in which order they stand. So what is too long
is thinned evenly, what is too short is followed by noise, and a mean is taken row by row over the tables that have it.
Knows no optimiser, no data and no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from promptmux_prompts import Prompt
from promptmux_prompts.importers.ofa import join_table
from promptmux_server.backbone.encoder import EncoderRow
from promptmux_server.backbone.layers import Attention, DecoderLayer, EncoderLayer
from promptmux_server.backbone.model import OFA

NOISE = 0.02
"""Standard deviation of a prompt that begins as nothing else, as released (ofa-spec 4.1)."""


@dataclass(frozen=True)
class Begin:
    """Rows (n, layers * 2 * d_model) that each side's table begins with; None: noise alone."""

    encoder: Tensor | None = None
    decoder: Tensor | None = None


FROM_NOISE = Begin()


def begin_of_texts(model: OFA, sources: Sequence[Sequence[int]]) -> Begin:
    """The keys and values of every layer for texts (bos ... eos), each read alone, one behind the other.

    As a prompt they say the same as if the texts stood in the input, without being sent. The decoder reads a text, but
    for its eos, behind the encoder's reading of the same, as OFA lets it read questions again (ofa-spec 7).
    """
    read = [_read(model, source) for source in sources]
    return Begin(torch.cat([encoder for encoder, _ in read]), torch.cat([decoder for _, decoder in read]))


def begin_of_prompts(prompts: Sequence[Prompt], encoder_length: int, decoder_length: int) -> Begin:
    """The mean of prompts of one backbone, for a prompt of these lengths."""
    encoders = [join_table(prompt.encoder_key, prompt.encoder_value) for prompt in prompts]
    decoders = [join_table(prompt.decoder_key, prompt.decoder_value) for prompt in prompts]
    return Begin(_mean(encoders, encoder_length), _mean(decoders, decoder_length))


def initial_table(length: int, width: int, seed: int, rows: Tensor | None = None) -> Tensor:
    """A table (length, width): `rows` (n, width), thinned if they are too many, and noise behind them."""
    table = torch.randn(length, width, generator=torch.Generator().manual_seed(seed)) * NOISE
    if rows is not None:
        fitting = thinned(rows, length)
        table[: len(fitting)] = fitting.to(table)
    return table


def thinned(rows: Tensor, length: int) -> Tensor:
    """At most `length` rows, evenly spread over all of them, the first one included."""
    if len(rows) <= length:
        return rows
    return rows[[index * len(rows) // length for index in range(length)]]


def _mean(tables: Sequence[Tensor], length: int) -> Tensor:
    """Row by row, over the tables that have the row."""
    fitting = [thinned(table.float(), length) for table in tables]
    longest = max(len(table) for table in fitting)
    total, count = torch.zeros(longest, fitting[0].shape[1]), torch.zeros(longest, 1)
    for table in fitting:
        total[: len(table)] += table
        count[: len(table)] += 1
    return total / count


@torch.no_grad()
def _read(model: OFA, source: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Both sides' tables of one text."""
    encoder, decoder = model.encoder.layers, model.decoder.layers
    with _heard(cast(EncoderLayer, layer).self_attn for layer in encoder) as encoded:
        memory = model.remember(model.encode([EncoderRow(source)]))
    with _heard(cast(DecoderLayer, layer).self_attn for layer in decoder) as decoded:
        model.teach([source[:-1]], memory)
    return torch.cat(encoded, dim=1).float(), torch.cat(decoded, dim=1).float()


@contextmanager
def _heard(attentions: Iterable[Attention]) -> Iterator[list[Tensor]]:
    """Yields what the layers' projections say: K, then V, (n, d_model) each, layer after layer."""
    said: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        said.append(output)

    projections = [projection for attention in attentions for projection in (attention.k_proj, attention.v_proj)]
    hooks = [projection.register_forward_hook(keep) for projection in projections]
    try:
        yield said
    finally:
        for hook in hooks:
            hook.remove()
