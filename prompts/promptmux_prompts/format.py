"""The prompt file: four tensors and a manifest in one safetensors file, with a digest of its content.

Reading checks before it parses and never maps the file, so that a file being written by somebody else can do no harm.
Knows nothing of registries or devices.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as serialise_safetensors
from torch import Tensor

from promptmux_prompts.errors import (
    InvalidPromptFile,
    PromptBackboneMismatch,
    PromptDigestMismatch,
    PromptNonfinite,
    PromptShapeMismatch,
)
from promptmux_prompts.header import ITEM_BYTES, MAX_HEADER_BYTES, METADATA_KEY, TENSORS, Header, read_header
from promptmux_prompts.manifest import Manifest

MAX_ABSOLUTE = 1e4
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class PromptShape:
    """What a backbone can take: layers and heads must fit exactly, lengths up to `max_length`."""

    encoder_layers: int
    decoder_layers: int
    heads: int
    head_dim: int
    max_length: int = 256

    @property
    def max_bytes(self) -> int:
        """Size of the largest file that could be read."""
        per_position = 2 * self.heads * self.head_dim * max(ITEM_BYTES.values())
        return 8 + MAX_HEADER_BYTES + (self.encoder_layers + self.decoder_layers) * self.max_length * per_position


@dataclass(frozen=True, eq=False)
class Prompt:
    """Deep prompts of one task: K and V of every layer, (layers, H, P, D) each; an absent side has P = 0.

    Layers that carry no prompt (`Manifest.encoder_layers`) hold zeros, which nobody reads.
    """

    manifest: Manifest
    encoder_key: Tensor
    encoder_value: Tensor
    decoder_key: Tensor
    decoder_value: Tensor
    digest: str
    """sha256 over manifest and stored tensors; it names the version for ever, whatever type it is served in."""

    @classmethod
    def build(
        cls, manifest: Manifest, encoder_key: Tensor, encoder_value: Tensor, decoder_key: Tensor, decoder_value: Tensor
    ) -> Self:
        """Put tensors of one type and a manifest together.

        Raises PromptShapeMismatch if lengths disagree, InvalidPromptFile if a layer without prompt holds numbers.
        """
        for key, value, length in (
            (encoder_key, encoder_value, manifest.encoder_length),
            (decoder_key, decoder_value, manifest.decoder_length),
        ):
            if key.shape != value.shape or key.shape[2] != length:
                raise PromptShapeMismatch("keys and values must agree with each other and with the manifest's lengths")
        prompt = cls(manifest, encoder_key, encoder_value, decoder_key, decoder_value, digest="")
        _check_absent_layers(manifest, prompt.tensors)
        return replace(prompt, digest=_digest(manifest, prompt.tensors))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name in the file, absent sides left out."""
        by_name = dict(
            zip(TENSORS, (self.decoder_key, self.decoder_value, self.encoder_key, self.encoder_value), strict=True)
        )
        return {name: tensor for name, tensor in by_name.items() if tensor.shape[2]}


def write_prompt(prompt: Prompt) -> bytes:
    """The file's bytes; equal prompts give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in prompt.tensors.items()}
    data: bytes = serialise_safetensors(tensors, {METADATA_KEY: prompt.manifest.to_json()})
    return data


def load_prompt(
    path: Path, *, shape: PromptShape, fingerprint: str | None, dtype: torch.dtype, sha256: str | None = None
) -> Prompt:
    """Read a file whole, then as `read_prompt`. Raises OSError as well."""
    return read_prompt(read_bytes(path, shape), shape=shape, fingerprint=fingerprint, dtype=dtype, sha256=sha256)


def read_bytes(path: Path, shape: PromptShape) -> bytes:
    """A whole file; one too large for any prompt of this shape is refused unread. Raises OSError as well."""
    if path.stat().st_size > shape.max_bytes:
        raise _too_large(shape)
    return path.read_bytes()


def read_prompt(
    data: bytes, *, shape: PromptShape, fingerprint: str | None, dtype: torch.dtype, sha256: str | None = None
) -> Prompt:
    """Check and parse a prompt file, cast to the type it is served in.

    `fingerprint` None accepts a prompt of any backbone; `sha256` is the content digest that was announced.
    Raises InvalidPromptFile, PromptShapeMismatch, PromptBackboneMismatch, PromptDigestMismatch, PromptNonfinite.
    """
    if len(data) > shape.max_bytes:
        raise _too_large(shape)
    manifest = _manifest(read_header(data), shape, fingerprint)
    try:
        stored = parse_safetensors(data)
    except Exception as error:  # the library raises KeyError, ValueError and TypeError too
        raise InvalidPromptFile("the tensors cannot be read") from error
    digest = _digest(manifest, stored)
    if sha256 is not None and digest != sha256:
        raise PromptDigestMismatch("the content's sha256 is not the one announced")
    _check_absent_layers(manifest, stored)
    parts = [
        stored.get(f"{side}.prefix.{part}", torch.zeros(layers, shape.heads, 0, shape.head_dim)).to(dtype)
        for side, layers in (("encoder", shape.encoder_layers), ("decoder", shape.decoder_layers))
        for part in ("key", "value")
    ]
    for tensor in parts:
        if tensor.numel() and not bool((tensor.float().abs() <= MAX_ABSOLUTE).all()):
            raise PromptNonfinite(f"values must be finite and at most {MAX_ABSOLUTE:g} once cast to {dtype}")
    return Prompt(manifest, parts[0], parts[1], parts[2], parts[3], digest)


def load_manifest(path: Path, *, shape: PromptShape, fingerprint: str | None) -> Manifest:
    """The manifest alone, checked against the header; the tensors are not read. Raises OSError as well."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > shape.max_bytes:
            raise _too_large(shape)
        return _manifest(read_header(file.read(8 + MAX_HEADER_BYTES), size), shape, fingerprint)


def _too_large(shape: PromptShape) -> InvalidPromptFile:
    return InvalidPromptFile(f"a prompt file for this backbone has at most {shape.max_bytes} bytes")


def _manifest(header: Header, shape: PromptShape, fingerprint: str | None) -> Manifest:
    """The manifest of a header, if both fit the backbone."""
    manifest = Manifest.from_json(header.manifest)
    _check_shapes(header, manifest, shape)
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise PromptBackboneMismatch(
            f"the prompt was trained for backbone {manifest.backbone_name[:64]!r} with another fingerprint"
        )
    return manifest


def _check_shapes(header: Header, manifest: Manifest, shape: PromptShape) -> None:
    for side, layers, length, present in (
        ("encoder", shape.encoder_layers, manifest.encoder_length, manifest.encoder_layers),
        ("decoder", shape.decoder_layers, manifest.decoder_length, manifest.decoder_layers),
    ):
        if present is not None and present[1] > layers:
            raise PromptShapeMismatch(f"{side}_layers are {list(present)}, the backbone's are [0, {layers}]")
        expected = (layers, shape.heads, length, shape.head_dim)
        for part in ("key", "value"):
            found = header.shapes.get(f"{side}.prefix.{part}", (layers, shape.heads, 0, shape.head_dim))
            if found != expected or length > shape.max_length:
                raise PromptShapeMismatch(f"{side}.prefix.{part} is {list(found)}, the backbone takes {list(expected)}")


def _check_absent_layers(manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Whoever ignores the manifest's layers must not find another prompt there."""
    for side, present in (("encoder", manifest.encoder_layers), ("decoder", manifest.decoder_layers)):
        for name in (f"{side}.prefix.key", f"{side}.prefix.value"):
            if present is not None and (tensors[name][: present[0]].any() or tensors[name][present[1] :].any()):
                raise InvalidPromptFile(f"{name} must be zero in layers outside {side}_layers, {list(present)}")


def _digest(manifest: Manifest, tensors: dict[str, Tensor]) -> str:
    """sha256 over the manifest and each tensor's name, type, shape and bytes, in the fixed order of TENSORS."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    sha = hashlib.sha256(manifest.to_json().encode())
    for name in TENSORS:
        if name in tensors and tensors[name].numel():
            tensor = tensors[name].detach().cpu().contiguous()
            sha.update(f"\n{name} {names[tensor.dtype]} {list(tensor.shape)}\n".encode())
            sha.update(tensor.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
