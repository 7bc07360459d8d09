"""What a job is made of: its task's manifest, what learns, and the prompt that comes of it. Opens no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from promptmux_prompts import InvalidPromptFile, Manifest, Prompt
from promptmux_server.backbone.assemble import assemble, serving_dtype
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.errors import DataError, TrainingConfigError
from promptmux_server.tasks import TaskSpec
from promptmux_server.training.data.manifests import bare_manifest, labels_for
from promptmux_server.training.data.source import distinct_targets, open_source
from promptmux_server.training.initial import FROM_NOISE, Begin
from promptmux_server.training.job_config import BeginConfig, JobConfig
from promptmux_server.training.methods import DeepPrompts, Method, weights_method
from promptmux_server.training.methods.prompts import prompt_layers
from promptmux_server.training.recipe import RecipeError
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
        if config.method.name != "prompt":
            dtype = torch.float32  # what its weights learn in
        else:
            dtype = serving_dtype(device) if machine.dtype == "auto" else getattr(torch, machine.dtype)
        model = assemble(loaded, dtype=dtype, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it was not built for
        raise TrainingConfigError("machine.device: there is no such device, or it has no room: try cpu.") from error
    return OpenBackbone(loaded, model, loaded.tokenizer())


def task_spec(config: JobConfig, backbone: OpenBackbone) -> TaskSpec:
    """The task with the lengths of its prompt, if it learns one; labels that are not named are those of the data.

    Raises TrainingConfigError, DataError.
    """
    task = config.task
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
        manifest = with_prompt(replace(manifest, decoding=dict(task.decoding)), config, backbone.loaded.config)
        return TaskSpec.from_manifest(manifest, backbone.loaded.config)
    except InvalidPromptFile as error:
        raise TrainingConfigError(f"There can be no such task: {error}.") from error


def with_prompt(manifest: Manifest, config: JobConfig, backbone: BackboneConfig) -> Manifest:
    """The manifest with lengths and layers of what a job learns, be it of another job's prompt.

    Raises TrainingConfigError for a prompt that there cannot be.
    """
    recipe = config.prompt
    if config.method.name != "prompt":
        return replace(manifest, encoder_length=0, decoder_length=0, encoder_layers=None, decoder_layers=None)
    try:
        layers = prompt_layers(backbone, recipe)
        return replace(
            manifest,
            encoder_length=recipe.encoder_length,
            decoder_length=recipe.decoder_length,
            encoder_layers=_unless_all(layers["encoder"], backbone.encoder_layers),
            decoder_layers=_unless_all(layers["decoder"], backbone.decoder_layers),
        )
    except RecipeError as error:
        raise TrainingConfigError(f"prompt.{error}.") from error
    except InvalidPromptFile as error:
        raise TrainingConfigError(f"There can be no such prompt: {error}.") from error


def _unless_all(layers: range, count: int) -> tuple[int, int] | None:
    return None if len(layers) == count else (layers.start, layers.stop)


def _labels_found(config: JobConfig) -> list[str]:
    found: dict[str, None] = {}
    premise = "{premise}" in (config.task.instruction or "")
    for source in config.data.train:
        opened = open_source(source, config.task.kind, config.cache_folder, premise=premise)
        found |= dict.fromkeys(distinct_targets(opened, MOST_LABELS))
    if len(found) > MOST_LABELS:
        raise DataError(f"There are more than {MOST_LABELS} different labels: say which the task has in task.answers.")
    return list(found)


def method_of(config: JobConfig, backbone: OpenBackbone, begin: Begin = FROM_NOISE) -> Method:
    """What learns, at its beginning; `begin` is of prompts alone. Raises TrainingConfigError."""
    method = config.method
    if method.name == "prompt":
        if config.prompt.generator == "mlp" and config.begin != BeginConfig():  # before anybody looks for rows
            raise TrainingConfigError("prompt.generator must be table where a prompt begins from given rows.")
        try:
            return DeepPrompts(backbone.model, config.prompt, seed=config.steps.seed, begin=begin)
        except RecipeError as error:
            raise TrainingConfigError(f"prompt.{error}.") from error
    try:
        return weights_method(method.name, backbone.loaded, backbone.model, seed=config.steps.seed, width=method.width)
    except ValueError as error:
        raise TrainingConfigError(f"method.name: {error}.") from error


def prompt_of(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Prompt:
    """A prompt file's content from what `DeepPrompts.saved` gives; a manifest of length 0 takes none of it."""
    parts = ("encoder.prefix.key", "encoder.prefix.value", "decoder.prefix.key", "decoder.prefix.value")
    if manifest.encoder_length == manifest.decoder_length == 0:
        tensors = dict.fromkeys(parts, torch.empty(0, 0, 0, 0))
    return Prompt.build(manifest, *(tensors[part].detach().cpu() for part in parts))
