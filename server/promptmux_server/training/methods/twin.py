"""A model over a frozen backbone's own tensors, in which chosen parameters are exchanged for copies that learn.

So a baseline that trains weights leaves the backbone as it is, shares what it does not train, and is served as a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from promptmux_server.backbone.assemble import FACTORED_ABOVE
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.model import OFA


def twin(config: BackboneConfig, tensors: Mapping[str, Tensor], *, folded: bool) -> OFA:
    """A frozen model that holds `tensors` themselves, not copies of them."""
    with torch.device("meta"):
        model = OFA(config, folded=folded)
    model.load_state_dict(dict(tensors), assign=True)
    if model.device.type == "cuda":
        model.encoder.factored_above = FACTORED_ABOVE
    return model.eval().requires_grad_(False)


def let_learn(model: OFA, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Exchange the named parameters for float32 copies that learn.

    Raises ValueError for a backbone in another type: such parameters could not meet float32 ones.
    """
    if model.dtype != torch.float32:
        raise ValueError("this method trains weights: load the backbone in float32 and let autocast round")
    learning: dict[str, nn.Parameter] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        parameter = nn.Parameter(getattr(module, leaf).detach().clone())
        setattr(module, leaf, parameter)
        learning[name] = parameter
    return learning
