"""A job begins where its configuration says, tells of it in the manifest, and does not look twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from promptmux_prompts import Prompt
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.initial import begin_of_prompts, begin_of_texts, initial_table
from promptmux_server.training.job import Job
from promptmux_server.training.job_config import BeginConfig
from promptmux_server.training.recipe import PromptRecipe, StepRecipe
from training.job_worker import any_score, backbone, config

SHORT = StepRecipe(steps=3, learning_rate=0.05)
ENCODER, DECODER = "encoder.embedding.weight", "decoder.embedding.weight"


def begun(folder: Path, *, generator: str = "table", **begin: Any) -> Job:
    made = config(folder, steps=SHORT)
    recipe = PromptRecipe(encoder_length=4, decoder_length=3, dropout=0.0, generator=generator)  # type: ignore[arg-type]
    changes = {"begin": BeginConfig(**begin), "prompt": recipe}
    return Job(made.model_copy(update=changes), backbone(), any_score)


def tables(job: Job) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in job.run.method.parameters.items()}


def told(job: Job) -> Any:
    list(job.events())
    return job.learned().manifest.provenance["begun_from"]


def foreign(name: str) -> Prompt:
    prompt = tiny.prompt(name, seed=8)
    manifest = replace(prompt.manifest, fingerprint="0" * 64)
    return Prompt.build(manifest, prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value)


def test_texts_fill_both_sides(tmp_path: Path) -> None:
    with begun(tmp_path, text=[" how many", " one"]) as job:
        job.resume()
        tokenizer = tiny.tokenizer()
        sources = [(BOS, *tokenizer.encode(text), EOS) for text in (" how many", " one")]
        expected, width = begin_of_texts(tiny.model(), sources), tables(job)[ENCODER].shape[1]
        assert torch.equal(tables(job)[ENCODER], initial_table(4, width, 1, expected.encoder))
        assert expected.decoder is not None
        assert torch.equal(tables(job)[DECODER][:3], initial_table(3, expected.decoder.shape[1], 2, expected.decoder))
        assert told(job) == [" how many", " one"]


def test_a_prompt_file_is_what_training_begins_with(tmp_path: Path) -> None:
    prompt = tiny.prompt("origin", encoder_length=4, decoder_length=3)
    tiny.write(tmp_path, prompt)
    with begun(tmp_path, prompt=str(tmp_path / "origin.safetensors")) as job:
        job.resume()
        assert torch.equal(tables(job)[ENCODER], begin_of_prompts([prompt], 4, 3).encoder)
        assert told(job) == [{"name": "origin", "sha256": prompt.digest, "weight": 1.0}]


def test_the_average_that_is_saved_begins_there_too(tmp_path: Path) -> None:
    prompt = tiny.prompt("origin")
    tiny.write(tmp_path, prompt)
    with begun(tmp_path, prompt="origin", among=str(tmp_path)) as job:
        job.resume()
        assert torch.equal(job.run.values()[ENCODER], tables(job)[ENCODER])


def test_the_mean_of_the_nearest_is_told_with_its_parts_and_others_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    near = {seed: tiny.prompt(f"p{seed}", seed=seed) for seed in range(3)}
    folder = tiny.write(tmp_path / "prompts", *near.values(), foreign("stranger"))
    with begun(tmp_path, nearest=2, among=str(folder)) as job:
        job.resume()
        first = tables(job)
        parts = told(job)
    assert "stranger is left out as a beginning: the prompt was trained for backbone" in caplog.text
    assert [part["weight"] for part in parts] == [0.5, 0.5]
    assert parts[0]["distance"] <= parts[1]["distance"]
    chosen = [prompt for part in parts for prompt in near.values() if prompt.digest == part["sha256"]]
    assert [prompt.manifest.name for prompt in chosen] == [part["name"] for part in parts]
    assert torch.equal(first[ENCODER], begin_of_prompts(chosen, 4, 3).encoder)


def test_a_job_that_goes_on_keeps_its_origin_and_looks_no_further(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "prompts", tiny.prompt("p", seed=1))
    with begun(tmp_path, nearest=1, among=str(folder)) as job:
        job.resume()
        list(job.events(lambda: job.run.step == 2))
    (folder / "p.safetensors").unlink()
    with begun(tmp_path, nearest=1, among=str(folder)) as job:
        assert job.resume() == 2
        assert told(job)[0]["name"] == "p"


def test_a_text_that_the_backbone_cannot_read_whole_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    most, tokenizer = tiny.config().max_positions, tiny.tokenizer()
    text = " one"
    while len(tokenizer.encode(text)) + 2 <= most:
        text += " one"
    length = len(tokenizer.encode(text)) + 2
    with pytest.raises(TrainingConfigError, match=rf"begin\.text: a text has {length} tokens.* may have {most}"):
        begun(tmp_path, text=[" one", text])
    assert not list((tmp_path / "cache").glob("survey-*"))
    fitting = text.removesuffix(" one")
    with begun(tmp_path, text=[fitting] * 2) as job:
        assert job.resume() == 0


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        ({"nearest": 1, "among": "prompts"}, "no prompt there can be begun from"),
        ({"nearest": 1, "among": "nowhere"}, "there is no such folder"),
        ({"prompt": "stranger", "among": "prompts"}, "stranger cannot be begun from: the prompt was trained for"),
        ({"prompt": "missing", "among": "prompts"}, "missing cannot be begun from: there is no such file"),
        ({"prompt": "prompts/missing.safetensors"}, "missing cannot be begun from: there is no such file"),
        ({"prompt": "out.safetensors", "generator": "mlp"}, "generator must be table"),
    ],
)
def test_a_beginning_that_cannot_be_had_is_refused(tmp_path: Path, begin: dict[str, Any], said: str) -> None:
    folder = tiny.write(tmp_path / "prompts", foreign("stranger"))
    tiny.write(tmp_path, tiny.prompt("out"))
    for key in ("among", "prompt"):
        if "/" in str(begin.get(key)) or begin.get(key) in ("prompts", "nowhere", "out.safetensors"):
            begin = {**begin, key: str(tmp_path / begin[key])}
    assert folder.is_dir()
    with pytest.raises(TrainingConfigError, match=said) as refused, begun(tmp_path, **begin) as job:
        job.resume()
    assert str(tmp_path) not in refused.value.message
