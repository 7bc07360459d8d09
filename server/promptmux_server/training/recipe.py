"""The numbers of a training run, as frozen values: what a prompt looks like, how it learns, how it is computed.

The defaults are the released recipe where it is known (paper 5, ofa-spec 4 and 9.6). Knows no tensors, data or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Generator = Literal["table", "mlp"]
MOST_SEED = 2**63 - 1
"""Of 64 bits with a sign: well below what torch takes, since every table adds its number to it."""


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names the field."""


def _hold(field: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise RecipeError(f"{field} must be {wanted}")


@dataclass(frozen=True, kw_only=True)
class PromptRecipe:
    """Deep prompts. A side of length 0 is left out: encoder only, decoder only, or both (paper, table 3)."""

    encoder_length: int = 64
    decoder_length: int = 64
    encoder_layers: tuple[int, ...] | None = None
    """Two numbers: the first of the layers that carry the prompt, and the one behind the last; None: all layers do."""
    decoder_layers: tuple[int, ...] | None = None
    generator: Generator = "table"
    """"mlp" learns a small network that makes the table, and is folded into a plain table when saved."""
    generator_width: int | None = None
    """Of the MLP's hidden layer; None: twice the model's width, as released."""
    dropout: float = 0.2
    """Of the prompt's own numbers, for every row anew. It pays over the released 40 epochs and more; runs of a few
    hundred steps do better without."""

    def __post_init__(self) -> None:
        _hold("encoder_length", self.encoder_length >= 0, "at least 0")
        _hold("decoder_length", self.decoder_length >= 0, "at least 0")
        _hold("encoder_length", self.encoder_length + self.decoder_length > 0, "above 0, or decoder_length be")
        self._check_layers("encoder_layers", self.encoder_layers, self.encoder_length)
        self._check_layers("decoder_layers", self.decoder_layers, self.decoder_length)
        _hold("generator", self.generator in ("table", "mlp"), "table or mlp")
        _hold("generator_width", self.generator_width is None or self.generator_width > 0, "above 0")
        _hold("dropout", 0.0 <= self.dropout < 1.0, "in [0, 1)")

    def _check_layers(self, field: str, layers: tuple[int, ...] | None, length: int) -> None:
        if layers is not None:
            _hold(field, length > 0, "left out where there is no prompt of that side")
            holds = len(layers) == 2 and 0 <= layers[0] < layers[1]
            _hold(field, holds, "two numbers, the first layer and the one behind the last")


@dataclass(frozen=True, kw_only=True)
class StepRecipe:
    """How any method learns: Adam with decoupled weight decay, warm-up, then linear decay to zero."""

    steps: int
    learning_rate: float = 0.03
    warmup: float = 0.06
    """Share of the steps."""
    weight_decay: float = 0.01
    """A step shrinks every trained number by rate * decay (decoupled from Adam's moments)."""
    clip_norm: float = 1.0
    """Of the gradient of all the run's parameters together."""
    smoothing: float = 0.1
    drop_worst: float = 0.0
    """Share of the target tokens of a batch, those with the largest loss, that are not learned from (captions: 0.2)."""
    drop_worst_after: int = 0
    """Steps before `drop_worst` begins."""
    backbone_dropout: float = 0.0
    """Of the frozen backbone's activations; released: 0.1."""
    backbone_drop_path: float = 0.0
    """Of whole branches of the last layer, rising linearly from 0 in the first; released: 0.1 to 0.2."""
    average_decay: float | None = None
    """Of an exponential moving average that is saved in place of the last parameters (VQA: 0.9999)."""
    accumulation: int = 1
    """Batches whose gradients make one step."""
    seed: int = 1

    def __post_init__(self) -> None:
        for field in ("steps", "accumulation"):
            _hold(field, getattr(self, field) >= 1, "at least 1")
        for field in ("learning_rate", "clip_norm"):
            _hold(field, getattr(self, field) > 0.0, "above 0")
        for field in ("weight_decay", "drop_worst_after"):
            _hold(field, getattr(self, field) >= 0, "at least 0")
        for field in ("warmup", "smoothing", "drop_worst", "backbone_dropout", "backbone_drop_path"):
            _hold(field, 0.0 <= getattr(self, field) < 1.0, "in [0, 1)")
        _hold("seed", -MOST_SEED - 1 <= self.seed <= MOST_SEED, f"a number of 64 bits, at most {MOST_SEED}")
        _hold("average_decay", self.average_decay is None or 0.0 < self.average_decay < 1.0, "between 0 and 1")

    def rate(self, step: int) -> float:
        """Learning rate of a step (from 0)."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * max(0, self.steps - step) / (self.steps - warm)

    def dropped(self, step: int) -> float:
        """Share of the worst tokens that a step (from 0) leaves out."""
        return self.drop_worst if step > self.drop_worst_after else 0.0


@dataclass(frozen=True, kw_only=True)
class ComputeRecipe:
    """How a pass is computed; what is learned differs only by rounding."""

    autocast: bool = False
    """Multiply in bfloat16 where the device does so natively; what learns stays in float32 either way."""
    recompute: bool = False
    """Gradient checkpointing: each layer's activations are computed again in the backward pass, not kept."""
    rows_per_pass: int | None = None
    """Rows that share one pass at most; further runs take the next pass. A single run's batch is never cut."""

    def __post_init__(self) -> None:
        _hold("rows_per_pass", self.rows_per_pass is None or self.rows_per_pass >= 1, "at least 1")


PLAINLY = ComputeRecipe()
