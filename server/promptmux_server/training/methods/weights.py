"""What the baselines share: methods whose parameters are weights of a model of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

from promptmux_server.backbone.model import OFA
from promptmux_server.training.chance import Chance
from promptmux_server.training.methods.twin import let_learn, twin

WeightsMethod = Literal["bitfit", "bitfit-full", "adapter", "finetune"]
"""Their names in configurations and files."""


class TrainedWeights:
    """Weights of a `twin` that learn; nothing stands in front of its rows."""

    def __init__(self, model: OFA, names: Iterable[str], *, needs_pixels: bool) -> None:
        self.model, self.needs_pixels = model, needs_pixels
        self.parameters = let_learn(model, names)

    def prompts(self, rows: int, chance: Chance | None) -> None:
        """Baselines have none."""

    def saved(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained weights under their own names: a patch to the backbone's tensors."""
        return {name: value.detach().contiguous() for name, value in values.items()}

    def adapted(self, values: Mapping[str, Tensor]) -> OFA:
        """A frozen model over these very tensors, so none that was kept of an earlier value is read."""
        return twin(self.model.config, self.model.state_dict() | dict(values), folded=self.model.folded)
