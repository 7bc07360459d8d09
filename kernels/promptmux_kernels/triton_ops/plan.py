"""What the host knows of a batch, as small tensors on the device.

Everything here depends on lengths and addresses only, never on a layer's values, so it is built once per batch and kept
by value: later layers pay a dictionary look-up, and no launch waits for the device. Knows nothing of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from promptmux_kernels.rows import Rows

KEPT = 512
"""Plans kept per function: a decoding batch needs about three new ones a step, of at most some kilobytes each."""


@lru_cache(maxsize=KEPT)
def integers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """(n,) int32."""
    return _on_device(values, torch.int32, device)


@lru_cache(maxsize=KEPT)
def fields(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """(B, fields) int64: addresses and strides that a kernel looks up by row."""
    return _on_device(rows, torch.int64, device)


@lru_cache(maxsize=KEPT)
def tiles(rows: Rows, chosen: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """(tiles, 4) int32, one per program: row, its first token on the flat axis, its tokens, first query of the tile.

    Only the `chosen` rows are cut. Blocks run outermost and rows inside, so that programs which run together read the
    same part of a shared bias table: it comes from L2 for all rows but the first.
    """
    longest = max(rows.lengths[row] for row in chosen)
    found = [
        (row, rows.starts[row], rows.lengths[row], first)
        for first in range(0, longest, block)
        for row in chosen
        if first < rows.lengths[row]
    ]
    return _on_device(found, torch.int32, device)


def _on_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":  # from pinned memory, or the copy would wait for everything queued before it
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
