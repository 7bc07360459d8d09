"""Deep prompts: learned keys and values in front of self-attention, in encoder, decoder or both (ofa-spec 4).

Each side is a plain table, or a small network that makes the table and is folded into it when saved. The backbone is
shared by all prompts, and only read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmux_kernels import RowsPrompt, Thinning
from promptmux_prompts.importers.ofa import fold_generator, split_table
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.model import OFA
from promptmux_server.training.chance import Chance, scale
from promptmux_server.training.initial import FROM_NOISE, Begin, initial_table
from promptmux_server.training.methods.method import KeyValue, Sides
from promptmux_server.training.recipe import PromptRecipe, RecipeError


class DeepPrompts:
    """The prompts of one task under training. Parameters are named as the released trainer stores them."""

    needs_pixels = False

    def __init__(self, model: OFA, recipe: PromptRecipe, *, seed: int, begin: Begin = FROM_NOISE) -> None:
        """Raises ValueError if the backbone would change, RecipeError if an MLP is to begin from rows, and for layers
        that there are not."""
        if model.training or any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("the backbone is not frozen: call eval() and requires_grad_(False) first")
        if recipe.generator == "mlp" and begin != FROM_NOISE:
            raise RecipeError("generator must be table where a prompt begins from given rows")
        self.model, self._recipe = model, recipe
        self._layers = prompt_layers(model.config, recipe)
        first = {
            "encoder.embedding.weight": self._columns("encoder", begin.encoder),
            "decoder.embedding.weight": self._columns("decoder", begin.decoder),
        }
        self.parameters = {
            name: nn.Parameter(_initial(shape, seed + number, first.get(name)).to(model.device))
            for number, (name, shape) in enumerate(prompt_shapes(model.config, recipe).items())
        }

    def prompts(self, rows: int, chance: Chance | None) -> Sides:
        encoder, decoder = (self._in_front(side, rows, chance) for side in self._layers)
        return encoder, decoder

    def adapted(self, values: Mapping[str, Tensor]) -> OFA:
        return self.model

    def sides(self, values: Mapping[str, Tensor]) -> tuple[KeyValue, KeyValue]:
        """K and V of encoder and decoder as they are served, made of the parameters' values."""
        return self._side("encoder", values), self._side("decoder", values)

    @torch.no_grad()
    def saved(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encoder, decoder = self.sides(values)
        parts = {"encoder.prefix": encoder, "decoder.prefix": decoder}
        return {
            f"{side}.{part}": tensor.contiguous()
            for side, pair in parts.items()
            for part, tensor in zip(("key", "value"), pair, strict=True)
        }

    def _side(self, side: str, values: Mapping[str, Tensor]) -> KeyValue:
        """Zeros stand in for layers that carry no prompt."""
        config, layers = self.model.config, self._layers[side]
        own = {name.removeprefix(f"{side}."): value for name, value in values.items() if name.startswith(f"{side}.")}
        width = len(layers) * 2 * config.d_model
        table = fold_generator(own) if own else torch.zeros(0, width, device=self.model.device)
        key, value = split_table(table, len(layers), config.heads)
        around = (0, 0, 0, 0, 0, 0, layers.start, _layer_counts(config)[side] - layers.stop)
        return F.pad(key, around), F.pad(value, around)

    def _columns(self, side: str, table: Tensor | None) -> Tensor | None:
        """Of a table of all layers, what is of those that carry the prompt."""
        layers, width = self._layers[side], 2 * self.model.config.d_model
        return None if table is None else table[:, layers.start * width : layers.stop * width]

    def _in_front(self, side: str, rows: int, chance: Chance | None) -> RowsPrompt:
        """With a chance every row has its own copy, with numbers dropped one by one, as released."""
        prompt = RowsPrompt.of(*self._side(side, self.parameters), rows, self._layers[side])
        dropped = self._recipe.dropout
        if chance is None or dropped == 0.0:
            return prompt
        shape, device = (2, *prompt.key.shape), prompt.key.device
        kept = [chance.kept(row, shape, dropped, f"{side} prompt", device) for row in range(rows)]
        return replace(prompt, thinning=Thinning(kept, scale(dropped)))


def _initial(shape: Sequence[int], seed: int, begin: Tensor | None) -> Tensor:
    """Noise, behind the rows that a table begins with; biases are zero."""
    if len(shape) == 1:
        return torch.zeros(*shape)
    length, width = shape
    return initial_table(length, width, seed, begin)


def prompt_layers(config: BackboneConfig, recipe: PromptRecipe) -> dict[str, range]:
    """By side, the layers that carry the prompt; raises RecipeError for some that there are not."""
    asked = {"encoder": recipe.encoder_layers, "decoder": recipe.decoder_layers}
    found: dict[str, range] = {}
    for side, count in _layer_counts(config).items():
        first, end = asked[side] or (0, count)
        if end > count:
            raise RecipeError(f"{side}_layers must lie within [0, {count}], the backbone's layers")
        found[side] = range(first, end)
    return found


def _layer_counts(config: BackboneConfig) -> dict[str, int]:
    return {"encoder": config.encoder_layers, "decoder": config.decoder_layers}


def prompt_shapes(config: BackboneConfig, recipe: PromptRecipe) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what learns; the names behind the side are those that `fold_generator` takes."""
    d, width = config.d_model, recipe.generator_width or 2 * config.d_model
    shapes: dict[str, tuple[int, ...]] = {}
    layers = prompt_layers(config, recipe)
    for side, length in (("encoder", recipe.encoder_length), ("decoder", recipe.decoder_length)):
        table = len(layers[side]) * 2 * d
        if length == 0:
            continue
        if recipe.generator == "table":
            shapes[f"{side}.embedding.weight"] = (length, table)
            continue
        shapes |= {
            f"{side}.embedding.weight": (length, d),
            f"{side}.trans.0.weight": (width, d),
            f"{side}.trans.0.bias": (width,),
            f"{side}.trans.2.weight": (table, width),
            f"{side}.trans.2.bias": (table,),
        }
    return shapes
