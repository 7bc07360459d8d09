"""Deep prompts taken from another program's file, before a manifest makes a prompt file of them.

Owns what all importers share: the size check, the type in which numbers are kept, where the origin is written down.
Knows no file format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from promptmux_prompts.errors import PromptShapeMismatch
from promptmux_prompts.format import DTYPES, Prompt, PromptShape
from promptmux_prompts.manifest import Manifest


@dataclass(frozen=True, eq=False)
class ImportedSides:
    """What a source says: K and V of each side, (layers, H, P, D) each, P = 0 where it has none; and its origin."""

    encoder: tuple[Tensor, Tensor]
    decoder: tuple[Tensor, Tensor]
    origin: Mapping[str, Any]
    """Goes into the manifest as `provenance.source`."""

    def prompt(self, manifest: Manifest) -> Prompt:
        """The prompt of this manifest, whose lengths, layers and origin are replaced by what was found.

        Numbers keep their type where prompt files know it and both sides have the same, else they become float32.
        """
        found = {t.dtype for t in (*self.encoder, *self.decoder) if t.shape[2]}
        dtype = found.pop() if len(found) == 1 else torch.float32
        if dtype not in DTYPES.values():
            dtype = torch.float32
        encoder, decoder = ([tensor.to(dtype) for tensor in side] for side in (self.encoder, self.decoder))
        described = replace(
            manifest,
            encoder_length=encoder[0].shape[2],
            decoder_length=decoder[0].shape[2],
            encoder_layers=None,
            decoder_layers=None,
            provenance={**manifest.provenance, "source": dict(self.origin)},
        )
        return Prompt.build(described, *encoder, *decoder)


def absent_side(layers: int, shape: PromptShape) -> tuple[Tensor, Tensor]:
    """K and V of a side without prompt."""
    nothing = torch.zeros(layers, shape.heads, 0, shape.head_dim)
    return nothing, nothing


def check_table(table: Tensor, layers: int, shape: PromptShape) -> None:
    """Raises PromptShapeMismatch unless the table is (P, layers * 2 * H * D) with P from 1 to the backbone's limit."""
    width = layers * 2 * shape.heads * shape.head_dim
    if table.ndim != 2 or table.shape[1] != width or not 1 <= table.shape[0] <= shape.max_length:
        raise PromptShapeMismatch(
            f"the prompt table is {list(table.shape)}; for {layers} layers of {shape.heads} heads of {shape.head_dim} "
            f"this backbone takes up to {shape.max_length} rows of {width}"
        )
