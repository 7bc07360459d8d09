"""What a job is made of: its task and data, what learns, and the prompt that comes of it. Opens no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptmux_prompts import InvalidPromptFile, Manifest, Prompt
from promptmux_server.backbone.assemble import assemble, serving_dtype
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.errors import DataError, TrainingConfigError
from promptmux_server.tasks import TaskSpec
from promptmux_server.training.data.batches import FileBatches
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.manifests import bare_manifest, labels_for
from promptmux_server.training.data.source import distinct_targets, open_source
from promptmux_server.training.data.task_data import TaskData, open_task_data
from promptmux_server.training.feature_cache import FeatureCache
from promptmux_server.training.initial import Begin
from promptmux_server.training.job_config import JobConfig
from promptmux_server.training.methods import DeepPrompts
from promptmux_server.training.ranks import ALONE, Ranks
from promptmux_server.training.recipe import RecipeError, StepRecipe
from promptmux_server.training.run import Run
from promptmux_server.training.seeing import Preparation, Stem
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
        manifest = replace(
            manifest,
            decoding=dict(task.decoding),
            encoder_length=prompt.encoder_length,
            decoder_length=prompt.decoder_length,
        )
        return TaskSpec.from_manifest(manifest, backbone.loaded.config)
    except InvalidPromptFile as error:
        raise TrainingConfigError(f"There can be no such task: {error}.") from error


def _labels_found(config: JobConfig) -> list[str]:
    found: dict[str, None] = {}
    premise = "{premise}" in (config.task.instruction or "")
    for source in config.data.train:
        opened = open_source(source, config.task.kind, config.cache_folder, premise=premise)
        found |= dict.fromkeys(distinct_targets(opened, MOST_LABELS))
    if len(found) > MOST_LABELS:
        raise DataError(f"There are more than {MOST_LABELS} different labels: say which the task has in task.answers.")
    return list(found)


def deep_prompts(config: JobConfig, backbone: OpenBackbone, begin: Begin) -> DeepPrompts:
    """What learns; raises TrainingConfigError."""
    try:
        return DeepPrompts(backbone.model, config.prompt, seed=config.steps.seed, begin=begin)
    except RecipeError as error:
        raise TrainingConfigError(f"prompt.{error}.") from error


@dataclass(frozen=True, eq=False)
class Material:
    """A job's task and data, checked, and the runs that may learn from them."""

    config: JobConfig
    backbone: OpenBackbone
    spec: TaskSpec
    data: TaskData
    seen: FeatureCache
    """To be entered while anything learns."""
    _encoder: SampleEncoder
    _stem: Stem

    def start(self, name: str, begin: Begin, recipe: StepRecipe, ranks: Ranks = ALONE) -> Run:
        """A run at its beginning, on this process's share of every batch; raises TrainingConfigError."""
        rows, worker, workers = self.config.run.rows, ranks.number, ranks.count
        batches = FileBatches(self.data.train, self._encoder, self._stem, rows, worker=worker, workers=workers)
        return Run(name, deep_prompts(self.config, self.backbone, begin), recipe, batches, ranks)


def open_material(config: JobConfig, backbone: OpenBackbone, ranks: Ranks) -> Material:
    """Raises TrainingConfigError, also for what several processes cannot do together, and DataError."""
    _check_divisible(config, ranks.count)
    spec = task_spec(config, backbone)
    encoder = SampleEncoder(spec, backbone.tokenizer)
    data = open_task_data(config.data, encoder, config.cache_folder)
    seen = FeatureCache(config.cache_folder / "pictures")
    stem = Stem(backbone.model, backbone.loaded.fingerprint, Preparation.of(spec), seen)
    return Material(config, backbone, spec, data, seen, encoder, stem)


def _check_divisible(config: JobConfig, processes: int) -> None:
    if config.run.rows < processes:
        raise TrainingConfigError(f"run.rows: {processes} processes need a row each of every batch: give more rows.")
    if processes > 1 and config.steps.drop_worst:
        raise TrainingConfigError(
            "steps.drop_worst: the worst tokens of a batch are found where all of it is: leave it out, or train in one "
            "process."
        )
    if processes > 1 and config.machine.device.startswith("cuda:"):
        raise TrainingConfigError("machine.device: several processes need a device each: say cuda, auto or cpu.")


def prompt_of(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Prompt:
    """A prompt file's content from what `DeepPrompts.saved` gives."""
    parts = ("encoder.prefix.key", "encoder.prefix.value", "decoder.prefix.key", "decoder.prefix.value")
    return Prompt.build(manifest, *(tensors[part].detach().cpu() for part in parts))


def described(prompt: Prompt, **changes: Any) -> Prompt:
    """The prompt with other keys of its manifest."""
    sides = (prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value)
    return Prompt.build(replace(prompt.manifest, **changes), *sides)
