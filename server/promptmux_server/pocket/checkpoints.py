"""Checkpoints of the embedded backbone's own trainings: named modules, one optimiser, and the step they stand at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torch.optim import Optimizer

from promptmux_server.training.curve import write_durably


def save(path: Path, step: int, modules: Mapping[str, nn.Module], optimizer: Optimizer) -> None:
    """A kill leaves the old file or this one; raises CheckpointNotWritten."""
    tensors = {
        f"{name}/{k}": v.contiguous() for name, module in modules.items() for k, v in module.state_dict().items()
    }
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value.contiguous() for key, value in entries.items()}
    write_durably(path, serialise(tensors, {"step": str(step)}))


def restore(path: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer) -> int:
    """Load what `save` wrote, and answer its step; 0 where nothing is written yet."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    for name, module in modules.items():
        module.load_state_dict(part_of(tensors, name))
    state = optimizer.state_dict()
    for name, value in part_of(tensors, "optimizer").items():
        index, key = name.split("/")
        state["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(state)
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def part_of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one module of a checkpoint, under the names that it knows."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
