"""Backbones as OFA's trainer stores them: a checkpoint `.pt`, or its tensors as safetensors with the same names."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from promptmux_server.backbone.config import RESNET_BLOCKS, BackboneConfig
from promptmux_server.backbone.weights.loaded import LoadedBackbone
from promptmux_server.backbone.weights.names import canonical_tensors, is_prompt
from promptmux_server.backbone.weights.pickles import read_pickle
from promptmux_server.errors import BackboneFileError

RELEASED_VOCABULARY = 59_457

_REQUIRED = {
    "scale_attn": True, "scale_fc": True, "scale_heads": True, "scale_resids": False, "disable_entangle": True,
    "entangle_position_embedding": False, "no_scale_embedding": True, "encoder_normalize_before": True,
    "decoder_normalize_before": True, "layernorm_embedding": True, "patch_layernorm_embedding": True,
    "add_type_embedding": True, "share_all_embeddings": True,
}  # fmt: skip
"""Architecture flags that every released OFA shares and that this implementation takes for granted."""


def read_checkpoint(path: Path) -> LoadedBackbone:
    """A fairseq checkpoint; the prompts that a prompt-tuned one carries are kept apart."""
    raw = read_pickle(path)
    if not isinstance(raw, dict) or "model" not in raw or not isinstance(raw["model"], dict):
        raise BackboneFileError(f"{path.name} is not a fairseq checkpoint: it has no model")
    arguments = (raw.get("cfg") or {}).get("model") or raw.get("args")
    if not isinstance(arguments, argparse.Namespace):
        raise BackboneFileError(f"{path.name} does not say its architecture (cfg.model)")
    return _loaded(config_from_arguments(vars(arguments), raw["model"], path.stem), raw["model"])


def read_safetensors(path: Path) -> LoadedBackbone:
    """The same tensors as safetensors, the architecture as JSON under the metadata key `config`."""
    with safe_open(path, "pt") as file:
        described = (file.metadata() or {}).get("config")
    if described is None:
        raise BackboneFileError(f"{path.name} does not say its architecture (metadata key config)")
    tensors = load_file(path)
    name = path.name.split(".")[0]
    return _loaded(config_from_arguments(json.loads(described), tensors, name), tensors)


def _loaded(config: BackboneConfig, found: Mapping[str, Tensor]) -> LoadedBackbone:
    tensors, dropped = canonical_tensors(found, config)
    prompts = {name: tensor for name, tensor in found.items() if is_prompt(name)}
    return LoadedBackbone(config, tensors, None, tuple(n for n in dropped if n not in prompts), prompts)


def config_from_arguments(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> BackboneConfig:
    """The configuration behind fairseq's arguments; raises BackboneFileError naming what is not supported."""
    for flag, value in _REQUIRED.items():
        if bool(arguments.get(flag, value)) != value:
            raise BackboneFileError(f"{flag}={arguments[flag]} is not supported; released OFA models have {value}")
    try:
        vocabulary = int(tensors["encoder.embed_tokens.weight"].shape[0])
        released = vocabulary == RELEASED_VOCABULARY
        return BackboneConfig(
            name=name,
            vocab_size=vocabulary,
            d_model=arguments["encoder_embed_dim"],
            ffn_dim=arguments["encoder_ffn_embed_dim"],
            heads=arguments["encoder_attention_heads"],
            encoder_layers=arguments["encoder_layers"],
            decoder_layers=arguments["decoder_layers"],
            resnet_blocks=RESNET_BLOCKS[arguments["resnet_type"]],
            image_bucket_size=arguments.get("image_bucket_size", 42),
            token_bucket_size=arguments.get("token_bucket_size", 256),
            max_positions=arguments.get("max_source_positions", 1024),
            num_codes=8192 if released else 0,
            num_bins=1000 if released else 0,
            image_size=arguments.get("patch_image_size", 480),
            orig_patch_image_size=arguments.get("orig_patch_image_size", 256),
            interpolate_position=bool(arguments.get("interpolate_position", False)),
            attn_scale_factor=float(arguments.get("attn_scale_factor", 2)),
            adapter_dim=arguments["adapter_dim"] if arguments.get("adapter") else None,
            dropout=float(arguments.get("dropout", 0.1)),
            encoder_drop_path=float(arguments.get("encoder_drop_path_rate", 0.0)),
            decoder_drop_path=float(arguments.get("decoder_drop_path_rate", 0.0)),
        )
    except KeyError as error:
        raise BackboneFileError(f"the checkpoint lacks {error}") from error
