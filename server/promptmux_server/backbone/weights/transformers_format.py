"""Backbones as published for the transformers library: config.json, weights, vocab.json, merges.txt (ofa-spec 10.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from promptmux_server.backbone.config import RESNET_BLOCKS, BackboneConfig
from promptmux_server.backbone.weights.fairseq import RELEASED_VOCABULARY
from promptmux_server.backbone.weights.loaded import LoadedBackbone
from promptmux_server.backbone.weights.names import canonical_tensors, from_transformers
from promptmux_server.backbone.weights.pickles import read_pickle
from promptmux_server.errors import BackboneFileError

_REQUIRED = {
    "normformer": True, "entangle_position_embedding": False, "scale_embedding": False, "add_type_embedding": True,
    "layernorm_embedding": True, "patch_layernorm_embedding": True, "encoder_normalize_before": True,
    "decoder_normalize_before": True, "share_decoder_input_output_embed": True,
}  # fmt: skip


def read_directory(directory: Path, raw: dict[str, Any]) -> LoadedBackbone:
    """Read a directory whose parsed config.json is `raw`."""
    config = config_from_transformers(raw, directory.name)
    safe, pickled = directory / "model.safetensors", directory / "pytorch_model.bin"
    if not safe.exists() and not pickled.exists():
        raise BackboneFileError("the directory holds neither model.safetensors nor pytorch_model.bin")
    found = load_file(safe) if safe.exists() else read_pickle(pickled)
    if not isinstance(found, dict):
        raise BackboneFileError(f"{pickled.name} is not a flat dictionary of tensors")
    tensors, dropped = canonical_tensors({from_transformers(name): value for name, value in found.items()}, config)
    has_tokenizer = (directory / "vocab.json").exists() and (directory / "merges.txt").exists()
    return LoadedBackbone(config, tensors, directory if has_tokenizer else None, dropped)


def config_from_transformers(raw: dict[str, Any], name: str) -> BackboneConfig:
    """The configuration behind a transformers config.json; raises BackboneFileError naming what is not supported."""
    for flag, value in _REQUIRED.items():
        if bool(raw.get(flag, value)) != value:
            raise BackboneFileError(f"{flag}={raw[flag]} is not supported; released OFA models have {value}")
    try:
        released = raw["vocab_size"] == RELEASED_VOCABULARY
        return BackboneConfig(
            name=name,
            vocab_size=raw["vocab_size"],
            d_model=raw["d_model"],
            ffn_dim=raw["encoder_ffn_dim"],
            heads=raw["encoder_attention_heads"],
            encoder_layers=raw["encoder_layers"],
            decoder_layers=raw["decoder_layers"],
            resnet_blocks=RESNET_BLOCKS[raw["resnet_type"]],
            image_bucket_size=raw.get("image_bucket_size", 42),
            token_bucket_size=raw.get("token_bucket_size", 256),
            max_positions=raw.get("max_position_embeddings", 1024),
            num_codes=8192 if released else 0,
            num_bins=1000 if released else 0,
            orig_patch_image_size=raw.get("orig_patch_image_size", 256),
            interpolate_position=bool(raw.get("interpolate_position", False)),
            attn_scale_factor=float(raw.get("attn_scale_factor", 2.0)),
            dropout=float(raw.get("dropout", 0.1)),
            encoder_drop_path=float(raw.get("encoder_drop_path_rate", 0.0)),
            decoder_drop_path=float(raw.get("decoder_drop_path_rate", 0.0)),
        )
    except KeyError as error:
        raise BackboneFileError(f"config.json lacks {error}") from error
