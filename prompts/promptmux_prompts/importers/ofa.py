"""Prompts as OFA's trainer stores them: one table per side, or an MLP that generates it (ofa-spec 4.1, 4.2).

Takes tensors by fairseq's names and knows nothing of checkpoints: whoever reads one must do so without running it.
The functions on tables are differentiable, so that a trainer may learn the stored form and serve the folded one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from promptmux_prompts.errors import ImportRefused, PromptShapeMismatch
from promptmux_prompts.format import PromptShape
from promptmux_prompts.importers.sides import ImportedSides, absent_side, check_table

_TABLE = frozenset({"embedding.weight"})
_GENERATOR = _TABLE | {f"trans.{number}.{part}" for number in (0, 2) for part in ("weight", "bias")}


def import_ofa(tensors: Mapping[str, Tensor], shape: PromptShape) -> ImportedSides:
    """The prompts among a fairseq checkpoint's tensors, generators folded in float32; other tensors are ignored.

    Raises ImportRefused if there are none or they are of another make, PromptShapeMismatch if they are of another size.
    """
    sides, origin = {}, {"format": "fairseq"}
    for side, layers in (("encoder", shape.encoder_layers), ("decoder", shape.decoder_layers)):
        stem = f"{side}.{side}_prompt_encoder."
        own = {name.removeprefix(stem): tensor for name, tensor in tensors.items() if name.startswith(stem)}
        if not own:
            sides[side] = absent_side(layers, shape)
            continue
        table = _folded(own)
        check_table(table, layers, shape)
        sides[side] = split_table(table, layers, shape.heads)
        origin[side] = "table" if own.keys() == _TABLE else "generator"
    if len(origin) == 1:
        raise ImportRefused(
            "the checkpoint holds no prompts: it was not trained with --encoder-prompt or --decoder-prompt. "
            "To serve it as a backbone, use promptmux convert"
        )
    return ImportedSides(sides["encoder"], sides["decoder"], origin)


def _folded(own: Mapping[str, Tensor]) -> Tensor:
    """The table of one side; a stored table keeps its type."""
    if own.keys() == _TABLE:
        return own["embedding.weight"]
    if own.keys() != _GENERATOR:
        raise ImportRefused(
            "the checkpoint's prompt encoder is neither a table (embedding) nor OFA's generator (embedding, trans.0, "
            "trans.2); fold it into a table embedding.weight (P, layers * 2 * d_model) before importing"
        )
    try:
        return fold_generator({name: tensor.float() for name, tensor in own.items()})
    except RuntimeError as error:
        raise PromptShapeMismatch("the matrices of the checkpoint's prompt generator do not fit each other") from error


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
