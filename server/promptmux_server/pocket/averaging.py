"""Processes that pretrain one backbone together: each learns from texts of its own, and now and then all go on from the
mean of what they have become.

Steps are not waited for one by one, as with summed gradients: two processes that share a core's caches would mostly
wait. Knows no model and no data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from promptmux_server.training.ranks import add_up


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """(number of this process, how many there are): 0 of 1, unless `torchrun` started it."""
    if not dist.is_torchelastic_launched():
        yield 0, 1
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def take_mean(optimizer: Optimizer) -> None:
    """Exchange what is trained, and its moments, for the means over all processes, to the bit the same in each.

    Moments too, so that a checkpoint of one process is that of all. Raises PeerLost.
    """
    tensors = _learned(optimizer)
    add_up(tensors)
    for tensor in tensors:
        tensor /= dist.get_world_size()


def _learned(optimizer: Optimizer) -> Sequence[Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [optimizer.state[parameter] for parameter in parameters]
    return [*parameters, *(state[name] for state in moments for name in ("exp_avg", "exp_avg_sq"))]
