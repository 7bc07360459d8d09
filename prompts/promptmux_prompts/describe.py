"""What a prompt consists of, in numbers that a person can judge: sizes, and norms of keys and values by layer.

A norm that stands out tells of a layer that learned nothing, or of one that ran away. Compares prompts with nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from promptmux_prompts.format import DTYPES, Prompt
from promptmux_prompts.manifest import Manifest


@dataclass(frozen=True)
class SideDescription:
    """One side's prompt."""

    shape: tuple[int, ...]
    """(layers, heads, length, head_dim), of the keys as of the values."""
    bytes: int
    key_norms: tuple[float, ...]
    """By layer: the mean, over heads and positions, of the Euclidean norm of a head's key."""
    value_norms: tuple[float, ...]


@dataclass(frozen=True)
class Description:
    """A prompt without its numbers."""

    manifest: Manifest
    sha256: str
    dtype: str
    """As in the file: F32, F16 or BF16."""
    encoder: SideDescription | None
    """None: the prompt has no such side."""
    decoder: SideDescription | None


def describe(prompt: Prompt) -> Description:
    """The prompt's manifest, digest, sizes and norms."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = prompt.tensors
    return Description(
        manifest=prompt.manifest,
        sha256=prompt.digest,
        dtype=names[next(iter(tensors.values())).dtype] if tensors else "F32",
        encoder=_side(prompt.encoder_key, prompt.encoder_value),
        decoder=_side(prompt.decoder_key, prompt.decoder_value),
    )


def _side(key: Tensor, value: Tensor) -> SideDescription | None:
    if not key.shape[2]:
        return None
    return SideDescription(tuple(key.shape), key.nbytes + value.nbytes, _norms(key), _norms(value))


def _norms(tensor: Tensor) -> tuple[float, ...]:
    norms = torch.linalg.vector_norm(tensor.float(), dim=-1).mean(dim=(1, 2))
    return tuple(round(norm, 6) for norm in norms.tolist())
