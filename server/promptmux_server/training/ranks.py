"""The processes that train one run together: which of them this one is, and what they tell one another.

Each passes its own rows of every batch, and what comes of them is added up, so that all take the same step. The first,
who leads, reads and writes the run's files. Knows no rows, data or files; who started the processes, and how long one
waits for another, is decided where torch's process group is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from promptmux_server.errors import PeerLost
from promptmux_server.training.loss import LossNumbers


class Ranks(Protocol):
    """One process among `count`; `number` counts from 0. All must call the same methods in the same order.

    Methods raise PeerLost where another process has ended or stays silent.
    """

    @property
    def number(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def leads(self) -> bool: ...

    def add_losses(self, loss: LossNumbers) -> LossNumbers:
        """The sum over all processes; where one is not finite, it is not finite anywhere."""
        ...

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Exchange every gradient for the sum over all processes."""
        ...

    def agree(self, wish: bool) -> bool:
        """Whether any process wishes so."""
        ...

    def hand_out(self, data: bytes) -> bytes:
        """The leader's data, at least a byte, whatever the others bring."""
        ...


class Alone:
    """A run of one process."""

    number, count, leads = 0, 1, True

    def add_losses(self, loss: LossNumbers) -> LossNumbers:
        return loss

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        pass

    def agree(self, wish: bool) -> bool:
        return wish

    def hand_out(self, data: bytes) -> bytes:
        return data


ALONE = Alone()


class Together:
    """The processes of torch's open default group; it must be able to reduce tensors of the host and of the device."""

    def __init__(self) -> None:
        self.number, self.count = dist.get_rank(), dist.get_world_size()

    @property
    def leads(self) -> bool:
        return self.number == 0

    def add_losses(self, loss: LossNumbers) -> LossNumbers:
        # In float64, which holds any count of tokens exactly.
        sums = torch.tensor([loss.total, loss.nll, loss.tokens], dtype=torch.float64)
        _exchanged(lambda: dist.all_reduce(sums))
        total, nll, tokens = sums.tolist()
        return LossNumbers(total, nll, int(tokens))

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        add_up([parameter.grad for parameter in parameters if parameter.grad is not None])

    def agree(self, wish: bool) -> bool:
        wishes = torch.tensor([int(wish)])
        _exchanged(lambda: dist.all_reduce(wishes))
        return bool(wishes)

    def hand_out(self, data: bytes) -> bytes:
        size = torch.tensor([len(data)])
        _exchanged(lambda: dist.broadcast(size, src=0))
        out = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.leads else _room(int(size))
        _exchanged(lambda: dist.broadcast(out, src=0))
        return out.numpy().tobytes()


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Exchange every tensor for its sum over all processes, to the bit the same in each; raises PeerLost."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])  # one exchange, a few MB
    _exchanged(lambda: dist.all_reduce(flat))
    for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def _room(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _exchanged(exchange: Callable[[], object]) -> None:
    try:
        exchange()
    except RuntimeError as error:  # what every backend raises for a closed connection and for a timeout
        raise PeerLost from error
