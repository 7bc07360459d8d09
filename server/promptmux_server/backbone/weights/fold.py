"""Batch normalisation folded into the convolutions in front of it: frozen statistics are a scale and a shift."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

EPSILON = 1e-5


def fold_batch_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical tensors -> tensors of the folded stem: each convolution gains a bias, the normalisations vanish.

    y = w * (x - mean) / sqrt(var + eps) + b, computed in float64, kept in float32: the fold must
    not round a 16-bit checkpoint a second time before the model's own cast.
    """
    folded = dict(tensors)
    for name in tensors:
        if name.startswith("encoder.embed_images.") and name.endswith(".running_mean"):
            norm = name.removesuffix(".running_mean")
            scale, shift, mean, variance = (
                folded.pop(f"{norm}.{part}").double() for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = scale / (variance + EPSILON).sqrt()
            conv = _convolution_before(norm)
            weight = tensors[f"{conv}.weight"]
            folded[f"{conv}.weight"] = (weight.double() * scale[:, None, None, None]).float()
            folded[f"{conv}.bias"] = (shift - mean * scale).float()
    return folded


def _convolution_before(norm: str) -> str:
    stem, _, last = norm.rpartition(".")
    return f"{stem}.0" if stem.endswith("downsample") else f"{stem}.{last.replace('bn', 'conv')}"
