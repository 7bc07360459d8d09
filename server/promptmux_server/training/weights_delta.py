"""What a method that trains weights has learned, as a file: a patch to one backbone, to be evaluated and not published.

One safetensors file of the trained tensors alone. One metadata key holds canonical JSON: the method, and the task with
its backbone's fingerprint, its score and where it came from, as a prompt's manifest says them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, get_args

import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from promptmux_prompts import InvalidPromptFile, Manifest
from promptmux_prompts.strict_json import canonical, parse
from promptmux_server.errors import BackboneFileError
from promptmux_server.training.methods.named import weights_method
from promptmux_server.training.methods.weights import WeightsMethod
from promptmux_server.training.validation import OpenBackbone

METADATA_KEY = "promptmux-weights"
FORMAT = 1
FIELDS = {"format", "method", "width", "task"}


@dataclass(frozen=True, eq=False)
class WeightsDelta:
    """Trained weights of one task, by their names in the method's model."""

    method: WeightsMethod
    width: int | None
    """Of adapters, where it is not the released one."""
    manifest: Manifest
    """The task, with a prompt of length 0."""
    tensors: Mapping[str, Tensor]


def write_delta(delta: WeightsDelta) -> bytes:
    """The file's bytes; equal deltas give equal bytes."""
    task = parse(delta.manifest.to_json(), "manifest")
    said = {"format": FORMAT, "method": delta.method, "width": delta.width, "task": task}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in delta.tensors.items()}
    data: bytes = serialise_tensors(tensors, {METADATA_KEY: canonical(said)})
    return data


def read_delta(data: bytes, fingerprint: str) -> WeightsDelta:
    """Parse a file for the backbone of a fingerprint; raises BackboneFileError."""
    said = _metadata(data)
    if said.keys() != FIELDS or said["format"] != FORMAT or said["method"] not in get_args(WeightsMethod):
        _refuse("it is of another version of this program")
    try:
        manifest = Manifest.from_json(canonical(said["task"]))
        tensors = parse_tensors(data)
    except Exception as error:  # safetensors raises KeyError, ValueError and TypeError beside its own error
        _refuse("its task or its tensors cannot be read", error)
    if manifest.fingerprint != fingerprint:
        _refuse(f"it was trained on backbone {manifest.backbone_name[:64]!r} with another fingerprint")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        _refuse("some of its numbers are not finite")
    return WeightsDelta(said["method"], said["width"], manifest, tensors)


def adapted_backbone(backbone: OpenBackbone, delta: WeightsDelta) -> OpenBackbone:
    """The backbone as it computes with a delta; raises BackboneFileError for weights that it does not have.

    The backbone must be in float32, as it was when the weights were trained.
    """
    method = weights_method(delta.method, backbone.loaded, backbone.model, width=delta.width)
    shapes = {name: parameter.shape for name, parameter in method.parameters.items()}
    if {name: tensor.shape for name, tensor in delta.tensors.items()} != shapes:
        _refuse("its tensors are not those that its method trains")
    values = {name: tensor.to(backbone.model.device, torch.float32) for name, tensor in delta.tensors.items()}
    return replace(backbone, model=method.adapted(values))


def _metadata(data: bytes) -> dict[str, Any]:
    try:
        header = parse(data[8 : 8 + int.from_bytes(data[:8], "little")], "header")
        said = parse(header["__metadata__"][METADATA_KEY], "metadata")
    except (InvalidPromptFile, KeyError, TypeError) as error:
        _refuse("it is not what this program writes", error)
    return said if isinstance(said, dict) else {}


def _refuse(reason: str, cause: Exception | None = None) -> NoReturn:
    raise BackboneFileError(f"The file of trained weights cannot be used: {reason}.") from cause
