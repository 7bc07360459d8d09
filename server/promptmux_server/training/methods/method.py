"""What the training loop asks of a way to adapt the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from promptmux_kernels import RowsPrompt
from promptmux_server.backbone.model import OFA
from promptmux_server.training.chance import Chance

KeyValue = tuple[Tensor, Tensor]
"""A prompt's K and V in one side of the backbone, each (layers, H, P, D)."""


Sides = tuple[RowsPrompt, RowsPrompt]
"""What stands in front of rows, in encoder and decoder."""


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

    def prompts(self, rows: int, chance: Chance | None) -> Sides | None:
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
