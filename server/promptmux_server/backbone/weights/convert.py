"""`promptmux convert`: any readable backbone becomes a directory of ours, prompts inside it become prompt files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from promptmux_prompts import Manifest, Prompt, write_prompt
from promptmux_prompts.importers.ofa import fold_generator, split_table
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.weights.load import load_backbone
from promptmux_server.backbone.weights.loaded import LoadedBackbone
from promptmux_server.backbone.weights.own_format import write_backbone


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote."""

    config: BackboneConfig
    fingerprint: str
    tensors: int
    dropped: tuple[str, ...]
    """Names in the source that text generation does not need."""
    has_tokenizer: bool
    prompts: tuple[Path, ...]
    """Prompt files, below the destination."""


def convert(source: Path, destination: Path) -> ConversionReport:
    """Read `source`, write `destination`; nothing in the source is executed. Raises what `load_backbone` raises."""
    backbone = load_backbone(source)
    write_backbone(destination, backbone)
    prompts = []
    if backbone.prompts:
        prompt = extract_prompt(backbone, name="imported")
        path = destination / "prompts" / f"{prompt.manifest.name}.safetensors"
        path.parent.mkdir()
        path.write_bytes(write_prompt(prompt))
        prompts.append(path)
    return ConversionReport(
        config=backbone.config,
        fingerprint=backbone.fingerprint,
        tensors=len(backbone.tensors),
        dropped=backbone.dropped,
        has_tokenizer=backbone.tokenizer_dir is not None,
        prompts=tuple(prompts),
    )


def extract_prompt(backbone: LoadedBackbone, *, name: str) -> Prompt:
    """The prompt that a prompt-tuned fairseq checkpoint carries, its generators folded (ofa-spec 4)."""
    config = backbone.config
    sides = []
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        stem = f"{side}.{side}_prompt_encoder."
        own = {key.removeprefix(stem): value.float() for key, value in backbone.prompts.items() if key.startswith(stem)}
        table = fold_generator(own) if own else torch.zeros(0, layers * 2 * config.d_model)
        sides.append(split_table(table, layers, config.heads))
    manifest = Manifest.minimal(
        name=name,
        backbone_name=config.name,
        fingerprint=backbone.fingerprint,
        encoder_length=sides[0][0].shape[2],
        decoder_length=sides[1][0].shape[2],
    )
    return Prompt.build(manifest, *sides[0], *sides[1])
