"""Our backbone directory: config.json, model.safetensors, vocab.json, merges.txt. Written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as serialise

from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.weights.loaded import LoadedBackbone
from promptmux_server.backbone.weights.names import canonical_tensors
from promptmux_server.errors import BackboneFileError

TOKENIZER_FILES = ("vocab.json", "merges.txt")


def read_directory(directory: Path) -> LoadedBackbone:
    """Read a directory that `write_backbone` wrote; raises BackboneFileError, BackboneKeysError, ConfigError."""
    config = BackboneConfig.from_json((directory / "config.json").read_text())
    weights = directory / "model.safetensors"
    if not weights.exists():
        raise BackboneFileError("the directory holds no model.safetensors")
    try:
        found = load_file(weights)
    except Exception as error:  # the library raises more than its own error
        raise BackboneFileError("model.safetensors cannot be read") from error
    tensors, dropped = canonical_tensors(found, config)
    has_tokenizer = all((directory / name).exists() for name in TOKENIZER_FILES)
    return LoadedBackbone(config, tensors, directory if has_tokenizer else None, dropped)


def write_backbone(destination: Path, backbone: LoadedBackbone) -> None:
    """Write the directory beside its place and rename it there; raises BackboneFileError if the place is taken."""
    if destination.exists() and any(destination.iterdir()):
        raise BackboneFileError("the destination exists and is not empty; choose another or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        _write_durably(unfinished / "config.json", backbone.config.to_json().encode())
        tensors = {name: tensor.contiguous() for name, tensor in backbone.tensors.items()}
        _write_durably(unfinished / "model.safetensors", serialise(tensors))
        if backbone.tokenizer_dir is not None:
            for name in TOKENIZER_FILES:
                _write_durably(unfinished / name, (backbone.tokenizer_dir / name).read_bytes())
        unfinished.chmod(0o755)
        if destination.exists():
            destination.rmdir()
        unfinished.rename(destination)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)
