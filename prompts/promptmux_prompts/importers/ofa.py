"""Prompts as OFA's trainer stores them: one table per side, or an MLP that generates it (ofa-spec 4.1, 4.2).

Every function is differentiable, so that a trainer may learn the stored form and serve the folded one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from promptmux_prompts.errors import PromptShapeMismatch


def fold_generator(tensors: Mapping[str, Tensor]) -> Tensor:
    """The prompt table (P, layers * 2 * d) of one side, from the names below its prompt encoder.

    `embedding.weight` alone is the table; with `trans.0` and `trans.2` it is W2 . relu(W1 . E + b1) + b2, row by row.
    """
    table = tensors["embedding.weight"]
    if "trans.0.weight" not in tensors:
        return table
    hidden = torch.relu(table @ tensors["trans.0.weight"].T + tensors["trans.0.bias"])
    return hidden @ tensors["trans.2.weight"].T + tensors["trans.2.bias"]


def split_table(table: Tensor, layers: int, heads: int) -> tuple[Tensor, Tensor]:
    """Table (P, layers * 2 * H * D), its last axis [layer][K then V][head][dim], to K and V, each (layers, H, P, D)."""
    length, width = table.shape
    if width % (layers * 2 * heads):
        raise PromptShapeMismatch(f"a table {width} wide does not divide into {layers} layers of {heads} heads")
    view = table.view(length, layers, 2, heads, width // (layers * 2 * heads)).permute(1, 2, 3, 0, 4)
    return view[:, 0], view[:, 1]


def join_table(key: Tensor, value: Tensor) -> Tensor:
    """The inverse of `split_table`: K and V, each (layers, H, P, D), to the table (P, layers * 2 * H * D)."""
    return torch.stack([key, value], dim=1).permute(3, 0, 1, 2, 4).flatten(1)
