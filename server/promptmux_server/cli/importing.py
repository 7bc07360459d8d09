"""From another program's prompt to a prompt file that a server with the named backbone accepts.

Owns which importer reads what, what the file's backbone is, and the checks that the server would make. Knows nothing of
options and tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from promptmux_prompts import Manifest, Prompt, PromptFileError, read_prompt, write_prompt
from promptmux_prompts.errors import ImportRefused
from promptmux_prompts.importers import ImportedSides, import_ofa, import_peft
from promptmux_prompts.importers.peft import Side
from promptmux_prompts.unfitted import load_unfitted
from promptmux_server.backbone.weights import LoadedBackbone, load_backbone
from promptmux_server.backbone.weights.differences import differences
from promptmux_server.tasks import TaskSpec

OF_THE_BACKBONE = ("backbone_name", "fingerprint")
"""Manifest keys that no task decides; its lengths and layers are replaced by what is found."""

DRIFTED = (
    "the checkpoint's batch normalisation drifted while it was trained, as the released recipe lets it, so answers on "
    "this backbone may differ a little from the trainer's; promptmux convert makes a backbone of the checkpoint itself"
)


@dataclass(frozen=True)
class Imported:
    """A prompt, its file's bytes, and what its user should know."""

    prompt: Prompt
    data: bytes
    notes: tuple[str, ...]


def import_prompt(
    source: Path, task: Mapping[str, Any], *, backbone: Path | None, side: Side, same_backbone: bool
) -> Imported:
    """Read a fairseq checkpoint or a PEFT directory, and check the outcome as a server would.

    `task` holds manifest keys, at least `name`. `backbone` None takes the checkpoint's own. `same_backbone` vouches for
    a PEFT adapter's base model. Raises ImportRefused, PromptFileError, BackboneError, OSError.
    """
    notes: tuple[str, ...] = ()
    if source.is_dir():
        if backbone is None:
            raise ImportRefused("a PEFT directory does not hold its base model; name the backbone (--backbone)")
        target = load_backbone(backbone)
        known_as = None if same_backbone else target.config.name
        sides = import_peft(source, target.prompt_shape, backbone_name=known_as, side=side)
    else:
        target, sides, notes = _from_checkpoint(source, backbone)
    prompt = sides.prompt(_manifest(task, target))
    TaskSpec.from_manifest(prompt.manifest, target.config)
    data = write_prompt(prompt)
    read_prompt(data, shape=target.prompt_shape, fingerprint=target.fingerprint, dtype=torch.float32)
    return Imported(prompt, data, notes)


def describe_import(imported: Imported) -> dict[str, Any]:
    """What came of it, and what it was made of."""
    manifest = imported.prompt.manifest
    return {
        "name": manifest.name,
        "kind": manifest.kind,
        "backbone": manifest.backbone_name,
        "encoder_length": manifest.encoder_length,
        "decoder_length": manifest.decoder_length,
        "sha256": imported.prompt.digest,
        "bytes": len(imported.data),
        "source": manifest.provenance["source"],
        "notes": list(imported.notes),
    }


def _from_checkpoint(source: Path, backbone: Path | None) -> tuple[LoadedBackbone, ImportedSides, tuple[str, ...]]:
    """The backbone to serve on, the prompt, and notes; refused if the prompt was trained on another backbone."""
    if source.is_file() and _is_prompt_file(source):
        raise ImportRefused("this is a prompt file already: put it into a prompt directory, or push it to a server")
    checkpoint = load_backbone(source)
    sides = import_ofa(checkpoint.prompts, checkpoint.prompt_shape)
    if backbone is None:
        return checkpoint, sides, ()
    target = load_backbone(backbone)
    found = differences(checkpoint, target)
    if found.weights:
        raise ImportRefused(
            f"the checkpoint's own backbone is another: {len(found.weights)} tensors differ, {found.weights[0]} among "
            "them. Leave --backbone out, and serve the checkpoint itself (promptmux convert)"
        )
    return target, sides, (DRIFTED,) if found.statistics else ()


def _is_prompt_file(path: Path) -> bool:
    try:
        load_unfitted(path)
    except PromptFileError:
        return False
    return True


def _manifest(task: Mapping[str, Any], backbone: LoadedBackbone) -> Manifest:
    """Text in, text out, unless the task says otherwise."""
    minimal = Manifest.minimal(
        name="unnamed",
        backbone_name=backbone.config.name,
        fingerprint=backbone.fingerprint,
        encoder_length=0,
        decoder_length=0,
    )
    filled = json.loads(minimal.to_json())
    return Manifest.from_json(json.dumps(filled | task | {key: filled[key] for key in OF_THE_BACKBONE}))
