"""BitFit: only biases learn (Ben Zaken et al. 2022), in the set that OFA's release trains or in full (ofa-spec 5.1)."""

from __future__ import annotations

from typing import Literal

from promptmux_server.backbone.model import OFA
from promptmux_server.training.methods.twin import twin
from promptmux_server.training.methods.weights import TrainedWeights

BiasSet = Literal["released", "full"]
"""released: of the norms in front of attention and feed-forward, of both final norms, and of fc1 and fc2.
full: every bias, the stem's, the projections' and the positions' among them."""


class BitFit(TrainedWeights):
    """Biases of a model that shares all else with the frozen backbone."""

    def __init__(self, model: OFA, biases: BiasSet = "released") -> None:
        copy = twin(model.config, model.state_dict(), folded=model.folded)
        names = [name for name, _ in copy.named_parameters() if trains(name, biases)]
        super().__init__(copy, names, needs_pixels=biases == "full")


def trains(name: str, biases: BiasSet) -> bool:
    """Whether a parameter belongs to the set; the released rule is a match of strings."""
    if not name.endswith("bias"):
        return False
    return biases == "full" or "layer_norm" in name or "fc" in name
