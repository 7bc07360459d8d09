"""What the training loop asks of a way to adapt the backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from promptmux_server.backbone.model import OFA
from promptmux_server.training.chance import Chance

KeyValue = tuple[Tensor, Tensor]
"""A prompt's K and V in one side of the backbone, each (layers, H, P, D)."""


@dataclass(frozen=True)
class RowPrompts:
    """Prompts of both sides, as many of each, and which of them every row reads."""

    encoder: Sequence[KeyValue]
    decoder: Sequence[KeyValue]
    of_row: Sequence[int]
    encoder_layers: range | None = None
    """Those that carry the prompts; None: all."""
    decoder_layers: range | None = None


class Method(Protocol):
    """One adaptation under training."""

    @property
    def model(self) -> OFA:
        """What the rows pass through. Runs whose methods share a model share its passes."""
        ...

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What learns, by name, in float32."""
        ...

    @property
    def needs_pixels(self) -> bool:
        """Whether it changes what the stem makes of a picture, so that nothing seen before may be used."""
        ...

    def prompts(self, rows: int, chance: Chance | None) -> RowPrompts | None:
        """What stands in front of `rows` rows; with a chance they are thinned for training. None: nothing."""
        ...

    def adapted(self, values: Mapping[str, Tensor]) -> OFA:
        """A frozen model that answers with the parameters' values, in front of which `saved`'s prompts stand, if any.

        Good until the next step.
        """
        ...

    def saved(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a file of this adaptation holds, made of the parameters' values (the last, or an average)."""
        ...


def trainable(method: Method) -> int:
    """Numbers that learn."""
    return sum(parameter.numel() for parameter in method.parameters.values())
