"""`promptmux convert`: any readable backbone becomes a directory of ours, prompts inside it become prompt files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from promptmux_prompts import Manifest, Prompt, PromptFileError, write_prompt
from promptmux_prompts.errors import ImportRefused
from promptmux_prompts.importers import import_ofa
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.weights.load import load_backbone
from promptmux_server.backbone.weights.loaded import LoadedBackbone
from promptmux_server.backbone.weights.own_format import write_backbone
from promptmux_server.errors import BackboneFileError


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
    found = [extract_prompt(backbone, name="imported")] if backbone.prompts else []
    write_backbone(destination, backbone)
    prompts = []
    for prompt in found:
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
    """The prompt that a prompt-tuned fairseq checkpoint carries; raises BackboneFileError if it cannot be had."""
    try:
        sides = import_ofa(backbone.prompts, backbone.prompt_shape)
    except (ImportRefused, PromptFileError) as error:
        raise BackboneFileError(str(error)) from error
    manifest = Manifest.minimal(
        name=name,
        backbone_name=backbone.config.name,
        fingerprint=backbone.fingerprint,
        encoder_length=0,
        decoder_length=0,
    )
    return sides.prompt(manifest)
