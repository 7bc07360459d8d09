"""Which format lies at a path."""

from __future__ import annotations

import json
from pathlib import Path

from promptmux_server.backbone.config import ConfigError
from promptmux_server.backbone.weights import fairseq, own_format, transformers_format
from promptmux_server.backbone.weights.loaded import LoadedBackbone
from promptmux_server.errors import BackboneFileError, BackboneNotFound


def load_backbone(path: Path) -> LoadedBackbone:
    """Read a backbone directory (ours or transformers') or a fairseq file (`.pt`, `.safetensors`) into memory.

    Raises BackboneNotFound, BackboneFileError, BackboneKeysError, UnsafePickle.
    """
    if not path.exists():
        raise BackboneNotFound(f"there is no backbone at {path}")
    try:
        if path.is_dir():
            return _load_directory(path)
        return fairseq.read_safetensors(path) if path.suffix == ".safetensors" else fairseq.read_checkpoint(path)
    except ConfigError as error:
        raise BackboneFileError(str(error)) from error


def _load_directory(directory: Path) -> LoadedBackbone:
    described = directory / "config.json"
    if not described.exists():
        raise BackboneFileError(f"{directory.name} holds no config.json")
    try:
        raw = json.loads(described.read_text())
    except ValueError as error:
        raise BackboneFileError("config.json is not JSON") from error
    if isinstance(raw, dict) and raw.get("model_type") == "ofa":
        return transformers_format.read_directory(directory, raw)
    return own_format.read_directory(directory)
