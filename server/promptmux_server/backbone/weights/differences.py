"""Whether two backbones are the same model, for a prompt that was trained on one and is to be served on the other.

The released recipe freezes every weight and still lets the statistics of batch normalisation drift (ofa-spec 4.4), so
the backbone inside a prompt-tuned checkpoint is nearly never, bit for bit, the one it was made from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from promptmux_server.backbone.weights.loaded import LoadedBackbone

_STATISTICS = (".running_mean", ".running_var")


@dataclass(frozen=True)
class Differences:
    """Names of tensors that differ, or that one of the two lacks."""

    statistics: tuple[str, ...]
    """Running means and variances of batch normalisation."""
    weights: tuple[str, ...]


def differences(a: LoadedBackbone, b: LoadedBackbone) -> Differences:
    """Compare all tensors, each pair in the coarser of its two types: a checkpoint may hold halves."""
    names = sorted(a.tensors.keys() | b.tensors.keys())
    found = [n for n in names if not _same(a.tensors.get(n), b.tensors.get(n))]
    return Differences(
        statistics=tuple(name for name in found if name.endswith(_STATISTICS)),
        weights=tuple(name for name in found if not name.endswith(_STATISTICS)),
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    dtype = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(a.to(dtype), b.to(dtype))
