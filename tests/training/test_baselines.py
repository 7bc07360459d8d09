"""Jobs that train weights: scored as trained, resumed to the same bits, kept as a patch of trained tensors alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import tiny
from promptmux_prompts import Prompt, write_prompt
from promptmux_server.backbone.weights import fingerprint
from promptmux_server.errors import BackboneFileError, TrainingConfigError, TrainingError
from promptmux_server.training.job import Job, Scored
from promptmux_server.training.job_config import MethodConfig
from promptmux_server.training.job_parts import method_of
from promptmux_server.training.methods.weights import WeightsMethod
from promptmux_server.training.metrics import Score
from promptmux_server.training.recipe import StepRecipe
from promptmux_server.training.validation import Exam, OpenBackbone
from promptmux_server.training.weights_delta import (
    METADATA_KEY,
    WeightsDelta,
    adapted_backbone,
    read_delta,
    write_delta,
)
from training.job_worker import any_score, backbone, config, job, run_to_the_end

SHORT = StepRecipe(steps=4, learning_rate=0.001, average_decay=0.5)
METHODS: tuple[WeightsMethod, ...] = ("bitfit", "bitfit-full", "adapter", "finetune")


def learned(folder: Path, name: WeightsMethod) -> WeightsDelta:
    found = run_to_the_end(folder, steps=SHORT, method=method(name))
    assert isinstance(found, WeightsDelta)
    return found


def method(name: WeightsMethod) -> MethodConfig:
    return MethodConfig(name=name, width=6 if name == "adapter" else None)


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_baseline_goes_on_to_the_same_bytes(tmp_path: Path, name: WeightsMethod) -> None:
    before = fingerprint(backbone().loaded.tensors), fingerprint(backbone().model.state_dict())
    whole = write_delta(learned(tmp_path / "whole", name))
    with job(tmp_path / "parts", steps=SHORT, method=method(name)) as opened:
        opened.resume()
        list(opened.events(lambda: opened.run.step == 3))
    assert write_delta(learned(tmp_path / "parts", name)) == whole
    assert (fingerprint(backbone().loaded.tensors), fingerprint(backbone().model.state_dict())) == before


@pytest.mark.parametrize("name", METHODS)
def test_a_file_holds_what_was_scored_and_nothing_else(tmp_path: Path, name: WeightsMethod) -> None:
    scored: list[tuple[dict[str, torch.Tensor], int]] = []

    def spy(asked: OpenBackbone, prompt: Prompt, exam: Exam) -> Score:
        assert not any(parameter.requires_grad for parameter in asked.model.parameters())
        values = {name: tensor.clone() for name, tensor in asked.model.state_dict().items()}
        scored.append((values, prompt.manifest.encoder_length + prompt.manifest.decoder_length))
        return Score(exam.metric, float(len(scored)), len(exam.questions))

    with job(tmp_path, scorer=spy, steps=SHORT, method=method(name), validate_every=2) as opened:
        opened.resume()
        assert [event.step for event in opened.events() if isinstance(event, Scored)] == [2, 4]
        found = opened.learned()
    assert isinstance(found, WeightsDelta)
    (tmp_path / "file").write_bytes(write_delta(found))
    with safe_open(tmp_path / "file", "pt") as file:  # any reader of safetensors
        assert set(file.keys()) == set(opened.method.parameters)
        (said,) = [json.loads(text) for key, text in file.metadata().items() if key == METADATA_KEY]
    assert said["task"]["fingerprint"] == tiny.backbone().fingerprint
    assert said["task"]["metric"] == {"name": "accuracy", "value": 2.0, "n": len(opened.exam.questions)}
    trained = sum(p.numel() for p in opened.method.parameters.values())
    assert (said["method"], said["task"]["provenance"]["trainable"]) == (name, trained)
    again = adapted_backbone(backbone(), read_delta(write_delta(found), tiny.backbone().fingerprint))
    last, prompt_length = scored[-1]
    assert prompt_length == 0
    assert fingerprint(again.model.state_dict()) == fingerprint(last)


def refused(data: bytes, said: str, print_: str | None = None) -> None:
    with pytest.raises(BackboneFileError, match=said):
        read_delta(data, print_ or tiny.backbone().fingerprint)


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    delta = learned(tmp_path, "bitfit")
    data = write_delta(delta)
    read_delta(data, tiny.backbone().fingerprint)
    refused(data, "another fingerprint", "0" * 64)
    refused(write_prompt(tiny.prompt()), "not what this program writes")
    for spoilt in (b"", data[:100], b"{}" * 50):
        refused(spoilt, "cannot be used")
    refused(data[:-4], "tensors cannot be read")
    first = next(iter(delta.tensors))
    refused(write_delta(replace(delta, tensors={first: delta.tensors[first] * float("nan")})), "not finite")
    with pytest.raises(BackboneFileError, match="not those that its method trains"):
        adapted_backbone(backbone(), replace(delta, tensors={first: delta.tensors[first]}))
    with pytest.raises(BackboneFileError, match="not those that its method trains"):
        adapted_backbone(backbone(), replace(delta, method="finetune"))


def test_checkpoints_of_another_method_are_refused(tmp_path: Path) -> None:
    learned(tmp_path, "bitfit")
    with pytest.raises(TrainingError, match="its method differ"):
        learned(tmp_path, "bitfit-full")


def test_a_backbone_with_adapters_takes_no_others(tmp_path: Path) -> None:
    mine = backbone()
    with_them = replace(mine, model=method_of(config(tmp_path, method=method("adapter")), mine).model)
    with pytest.raises(TrainingConfigError, match="has adapters already"):
        method_of(config(tmp_path, method=method("adapter")), with_them)


def test_a_generator_is_folded_into_a_plain_prompt(tmp_path: Path) -> None:
    given = config(tmp_path, steps=replace(SHORT, steps=2))
    mlp = replace(given.prompt, generator="mlp", generator_width=8)
    with Job(given.model_copy(update={"prompt": mlp}), backbone(), any_score) as opened:
        assert "encoder.trans.0.weight" in opened.method.parameters
        opened.resume()
        list(opened.events())
        prompt = opened.learned()
    assert isinstance(prompt, Prompt)
    assert prompt.encoder_key.shape == (2, 2, 4, 32)
    assert prompt.manifest.provenance["trainable"] == sum(p.numel() for p in opened.method.parameters.values())
