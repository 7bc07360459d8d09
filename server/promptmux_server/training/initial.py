"""Where a prompt may begin: noise, or the keys and values that the backbone itself computes for a text.

A text's keys and values are what every layer would see if the text stood in the input; as a prompt they say the same
without being sent. Knows no optimiser and no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from promptmux_server.backbone.encoder import EncoderRow
from promptmux_server.backbone.layers import EncoderLayer
from promptmux_server.backbone.model import OFA

NOISE = 0.02
"""Standard deviation of a prompt without a text, as released (ofa-spec 4.1)."""


@torch.no_grad()
def text_table(model: OFA, source: Sequence[int]) -> Tensor:
    """The encoder's keys and values of a text-only source (bos ... eos) as a table (n, layers * 2 * d_model)."""
    projections = [
        projection
        for layer in model.encoder.layers
        for projection in (cast(EncoderLayer, layer).self_attn.k_proj, cast(EncoderLayer, layer).self_attn.v_proj)
    ]
    seen: list[Tensor] = []
    hooks = [p.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for p in projections]
    try:
        model.encode([EncoderRow(source)])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(seen, dim=1).float()


def initial_table(length: int, width: int, seed: int, text: Tensor | None = None) -> Tensor:
    """A table (length, width) of noise whose first rows are `text` (n, width), as far as they fit."""
    table = torch.randn(length, width, generator=torch.Generator().manual_seed(seed)) * NOISE
    if text is not None:
        rows = min(length, len(text))
        table[:rows] = text[:rows].to(table)
    return table
