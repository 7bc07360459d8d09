"""The methods that train weights, by their names."""

from __future__ import annotations

from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.weights import LoadedBackbone
from promptmux_server.training.methods.adapters import RELEASED_WIDTH, Adapters
from promptmux_server.training.methods.bitfit import BitFit
from promptmux_server.training.methods.finetune import FineTuning
from promptmux_server.training.methods.weights import TrainedWeights, WeightsMethod


def weights_method(
    name: WeightsMethod, loaded: LoadedBackbone, model: OFA, *, seed: int = 1, width: int | None = None
) -> TrainedWeights:
    """A method over a backbone as it was read and as it computes; `width` is of adapters (None: as released).

    Raises ValueError for a model in another type than float32, or with adapters of its own.
    """
    match name:
        case "bitfit":
            return BitFit(model)
        case "bitfit-full":
            return BitFit(model, "full")
        case "adapter":
            return Adapters(model, seed=seed, width=width or RELEASED_WIDTH)
        case "finetune":
            return FineTuning(loaded, model.device)
