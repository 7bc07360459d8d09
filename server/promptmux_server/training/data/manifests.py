"""A task that has no prompt yet, described by its kind and what its data hold: OFA's instruction, the labels found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from promptmux_prompts import ImageInput, Kind, Manifest
from promptmux_server.backbone.weights import LoadedBackbone
from promptmux_server.tasks.text import INSTRUCTIONS

KIND_INSTRUCTIONS: Mapping[Kind, str] = {
    "caption": INSTRUCTIONS["caption"],
    "answer": INSTRUCTIONS["vqa"],
    "label": INSTRUCTIONS["entailment"],
    "box": INSTRUCTIONS["grounding"],
    "text": " {text}",
}

ENTAILMENT_LABELS = {"yes": "entailment", "no": "contradiction", "maybe": "neutral"}
"""OFA's answers (ofa-spec 7)."""


def labels_for(names: Sequence[str]) -> dict[str, str]:
    """Answer by answer, the label it stands for: OFA's words for entailment, else a label's own name."""
    return ENTAILMENT_LABELS if set(names) <= set(ENTAILMENT_LABELS.values()) else {name: name for name in names}


def bare_manifest(
    name: str,
    kind: Kind,
    backbone: LoadedBackbone,
    *,
    instruction: str | None = None,
    answers: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    takes_image: bool = True,
) -> Manifest:
    """The task on the backbone alone, with prompts of length 0; raises InvalidPromptFile for what no task can be."""
    config = backbone.config
    return Manifest(
        name=name,
        kind=kind,
        backbone_name=config.name,
        fingerprint=backbone.fingerprint,
        encoder_length=0,
        decoder_length=0,
        instruction=KIND_INSTRUCTIONS[kind] if instruction is None else instruction,
        image=ImageInput(config.image_size, config.image_mean, config.image_std) if takes_image else None,
        answers=tuple(answers) if answers is not None else tuple(labels) if labels is not None else None,
        labels=labels,
    )
