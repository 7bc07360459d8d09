"""What a device's exceptions mean: too little memory, which passes, or a device lost until the process restarts.

Knows PyTorch's exceptions by type, and by message where it has no type for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

HOST_OUT_OF_MEMORY = "can't allocate memory"
"""PyTorch's CPU allocator raises a plain RuntimeError with these words."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may succeed where this one failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and HOST_OUT_OF_MEMORY in str(error)


def is_device_lost(error: BaseException) -> bool:
    """Whether every later call on the device will fail too, as after a device-side assertion."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def in_parts_that_fit(
    items: Sequence[Item],
    compute: Callable[[Sequence[Item]], Result],
    accept: Callable[[Sequence[Item], Result], None],
    give_up: Callable[[Item, Exception], None],
) -> None:
    """Compute for all items together; where that exceeds the device's memory, in halves, down to an item that fails."""
    try:
        result = compute(items)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if len(items) == 1:
            give_up(items[0], error)
            return
    else:
        accept(items, result)
        return
    middle = len(items) // 2
    for part in (items[:middle], items[middle:]):
        in_parts_that_fit(part, compute, accept, give_up)
