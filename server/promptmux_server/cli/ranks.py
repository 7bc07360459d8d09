"""This process's place among those that `torchrun` started, and its share of the machine.

    torchrun --nproc-per-node 2 -m promptmux_server train pets.toml

On GPUs each process takes one, and gradients go by nccl; all else, and everything on a CPU, goes by gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from promptmux_server.cli.machine import usable_cores
from promptmux_server.errors import PeerLost, TrainingConfigError
from promptmux_server.training.job_config import MachineConfig
from promptmux_server.training.ranks import ALONE, Ranks, Together


@contextmanager
def ranks_here(machine: MachineConfig) -> Iterator[Ranks]:
    """Alone, unless `torchrun` started this process. Raises PeerLost, and TrainingConfigError without enough GPUs."""
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    gpus = machine.device != "cpu" and torch.cuda.is_available()
    if gpus:
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(seconds=machine.patience_s))
    except RuntimeError as error:
        raise PeerLost from error
    try:
        yield Together()
    finally:
        dist.destroy_process_group()


def refuse_torchrun(why: str) -> None:
    """Raises TrainingConfigError in a process that `torchrun` started, for what each of them would do on its own."""
    if dist.is_torchelastic_launched():
        raise TrainingConfigError(f"torchrun runs this command once for each process, and {why}: run it without.")


def _take_gpu(number: int) -> None:
    if number >= torch.cuda.device_count():
        raise TrainingConfigError(
            f"machine.device: there are {torch.cuda.device_count()} GPUs, and each process needs one: start fewer."
        )
    torch.cuda.set_device(number)


def share_of_cores() -> int:
    """Cores for this process, where several on this machine compute at once."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
