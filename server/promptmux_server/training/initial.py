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
import torch.nn.functional as F
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
    """Rows (n, layers * 2 * d_model) that each side's table begins with; None, and NaN where it stands: noise."""

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
    """The mean of prompts of one backbone, for a prompt of these lengths; NaN where none of them has a number."""
    encoders = [_table(each.encoder_key, each.encoder_value, each.manifest.encoder_layers) for each in prompts]
    decoders = [_table(each.decoder_key, each.decoder_value, each.manifest.decoder_layers) for each in prompts]
    return Begin(_mean(encoders, encoder_length), _mean(decoders, decoder_length))


def initial_table(length: int, width: int, seed: int, rows: Tensor | None = None) -> Tensor:
    """A table (length, width): `rows` (n, width), thinned if they are too many, and noise where they say nothing."""
    table = torch.randn(length, width, generator=torch.Generator().manual_seed(seed)) * NOISE
    if rows is not None:
        fitting = thinned(rows, length).to(table)
        table[: len(fitting)] = torch.where(fitting.isnan(), table[: len(fitting)], fitting)
    return table


def thinned(rows: Tensor, length: int) -> Tensor:
    """At most `length` rows, evenly spread over all of them, the first one included."""
    if len(rows) <= length:
        return rows
    return rows[[index * len(rows) // length for index in range(length)]]


def _table(key: Tensor, value: Tensor, layers: tuple[int, int] | None) -> Tensor:
    """K and V (layers, H, P, D) as rows (P, layers * 2 * d_model), NaN in layers that carry no prompt."""
    table = join_table(key.float(), value.float())
    if layers is not None:
        width = table.shape[1] // len(key)
        table[:, : layers[0] * width] = table[:, layers[1] * width :] = torch.nan
    return table


def _mean(tables: Sequence[Tensor], length: int) -> Tensor:
    """Number by number, over the tables that have it; NaN where none has."""
    fitting = [thinned(table, length) for table in tables]
    longest = max(map(len, fitting))
    padded = [F.pad(table, (0, 0, 0, longest - len(table)), value=torch.nan) for table in fitting]
    return torch.stack(padded).nanmean(0)


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
