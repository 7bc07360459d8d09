"""What pretraining optimises on a batch's texts. Knows the model, and which tokens are places."""

from __future__ import annotations

import torch
from torch import Tensor

from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.model import OFA
from promptmux_server.training.forward import Example, supervised_logits
from promptmux_server.training.loss import Loss

PLACE_SPREAD = 1.5
"""Bins (pixels) by which a place may be off before the loss is much worse for it."""


def text_loss(model: OFA, images: list[ImageTokens], examples: list[Example]) -> Loss:
    """Cross-entropy of a batch's texts; its `nll` is that of the exact tokens.

    A token of a target with n tokens weighs n ** -0.5: unweighted, lists of boxes drown the answers of one word, which
    were then a twentieth of all tokens and the last to be learnt. A place is taught as a bell over its neighbours: as a
    class of its own it says nothing of them, and each of 128 bins has to be learnt alone.
    """
    logits, targets = supervised_logits(model, examples, images)
    log_probs = logits.float().log_softmax(-1)  # (T, V)
    lengths = torch.tensor([len(example.target) + 1 for example in examples], device=logits.device)
    weights = lengths.float().rsqrt().repeat_interleave(lengths)  # (T,)
    nll = -log_probs.gather(1, targets[:, None])[:, 0]
    first = model.config.first_bin_id
    place = targets >= first
    bells = place_targets(targets[place] - first, model.config.num_bins)
    loss = nll.masked_scatter(place, -(bells * log_probs[place, first : first + model.config.num_bins]).sum(1))
    return Loss((loss * weights).sum(), nll.sum(), len(nll))


def place_targets(bins: Tensor, count: int) -> Tensor:
    """Bins (P,) -> distributions (P, count), bells around them."""
    distance = (torch.arange(count, device=bins.device) - bins[:, None]) / PLACE_SPREAD
    return (-0.5 * distance.square()).softmax(-1)
