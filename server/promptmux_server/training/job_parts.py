"""What a job is made of: its task's manifest, what learns, and the prompt that comes of it. Opens no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptmux_prompts import InvalidPromptFile, Manifest, Prompt
from promptmux_server.backbone.assemble import assemble, serving_dtype
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.errors import DataError, TrainingConfigError
from promptmux_server.tasks import TaskSpec
from promptmux_server.training.data.manifests import bare_manifest, labels_for
from promptmux_server.training.data.source import distinct_targets, open_source
from promptmux_server.training.initial import text_table
from promptmux_server.training.job_config import JobConfig
from promptmux_server.training.methods import DeepPrompts
from promptmux_server.training.methods.prompts import FROM_NOISE, Begin
from promptmux_server.training.recipe import PromptRecipe, RecipeError
from promptmux_server.training.validation import OpenBackbone

MOST_LABELS = 256


def open_backbone(config: JobConfig, pocket: Path) -> OpenBackbone:
    """The frozen backbone of a job, where `pocket` are the embedded one's files.

    Raises BackboneError, or TrainingConfigError for a device that there is not.
    """
    loaded = load_backbone(pocket if config.backbone == "pocket" else Path(config.backbone))
    machine = config.machine
    device = ("cuda" if torch.cuda.is_available() else "cpu") if machine.device == "auto" else machine.device
    try:
        dtype = serving_dtype(device) if machine.dtype == "auto" else getattr(torch, machine.dtype)
        model = assemble(loaded, dtype=dtype, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it was not built for
        raise TrainingConfigError("machine.device: there is no such device, or it has no room: try cpu.") from error
    return OpenBackbone(loaded, model, loaded.tokenizer())


def task_spec(config: JobConfig, backbone: OpenBackbone) -> TaskSpec:
    """The task with the lengths of its prompt; labels that are not named are those of the data.

    Raises TrainingConfigError, DataError.
    """
    task, prompt = config.task, config.prompt
    labels = None
    if task.kind == "label":
        labels = labels_for(task.answers or _labels_found(config))
    try:
        manifest = bare_manifest(
            task.name,
            task.kind,
            backbone.loaded,
            instruction=task.instruction,
            answers=None if labels else task.answers,
            labels=labels,
            takes_image=task.takes_image,
        )
        manifest = with_lengths(replace(manifest, decoding=dict(task.decoding)), prompt)
        return TaskSpec.from_manifest(manifest, backbone.loaded.config)
    except InvalidPromptFile as error:
        raise TrainingConfigError(f"There can be no such task: {error}.") from error


def with_lengths(manifest: Manifest, prompt: PromptRecipe) -> Manifest:
    """The manifest for a prompt of this recipe; raises TrainingConfigError for one that is too long."""
    try:
        return replace(manifest, encoder_length=prompt.encoder_length, decoder_length=prompt.decoder_length)
    except InvalidPromptFile as error:
        raise TrainingConfigError(f"There can be no such prompt: {error}.") from error


def _labels_found(config: JobConfig) -> list[str]:
    found: dict[str, None] = {}
    premise = "{premise}" in (config.task.instruction or "")
    for source in config.data.train:
        opened = open_source(source, config.task.kind, config.cache_folder, premise=premise)
        found |= dict.fromkeys(distinct_targets(opened, MOST_LABELS))
    if len(found) > MOST_LABELS:
        raise DataError(f"There are more than {MOST_LABELS} different labels: say which the task has in task.answers.")
    return list(found)


def deep_prompts(config: JobConfig, backbone: OpenBackbone) -> DeepPrompts:
    """What learns, at its beginning; raises TrainingConfigError."""
    begin, text = FROM_NOISE, config.begin.text
    if text is not None:
        source = (BOS, *backbone.tokenizer.encode(text), EOS)
        begin = Begin(encoder=text_table(backbone.model, source))
    try:
        return DeepPrompts(backbone.model, config.prompt, seed=config.steps.seed, begin=begin)
    except RecipeError as error:
        raise TrainingConfigError(f"prompt.{error}.") from error


def prompt_of(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Prompt:
    """A prompt file's content from what `DeepPrompts.saved` gives."""
    parts = ("encoder.prefix.key", "encoder.prefix.value", "decoder.prefix.key", "decoder.prefix.value")
    return Prompt.build(manifest, *(tensors[part].detach().cpu() for part in parts))


def described(prompt: Prompt, **changes: Any) -> Prompt:
    """The prompt with other keys of its manifest."""
    sides = (prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value)
    return Prompt.build(replace(prompt.manifest, **changes), *sides)
