"""`promptmux train` with other methods than prompts: a file of trained weights, and never a publication."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tiny
from cli.tiny_training import CONFIG, prepare
from promptmux_server.cli import app
from promptmux_server.training.weights_delta import read_delta

PROMPT = "prompt = {encoder_length = 4, decoder_length = 3}\n"


def train(folder: Path, name: str, *arguments: str) -> Result:
    assert PROMPT in CONFIG
    text = CONFIG.replace(PROMPT, f'method = {{name = "{name}"}}\n').replace(
        "{steps = 6}", "{steps = 2, learning_rate = 1e-3}"
    )
    return CliRunner().invoke(app, ["train", str(prepare(folder, text)), *arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("name", ["bitfit", "bitfit-full", "adapter", "finetune"])
def test_a_baseline_is_scored_by_the_engine_and_kept(tmp_path: Path, name: str) -> None:
    done = train(tmp_path, name, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    path = tmp_path / "out" / f"counting.{name}.safetensors"
    delta = read_delta(path.read_bytes(), tiny.backbone().fingerprint)
    assert (told["file"], told["metric"]) == (str(path), delta.manifest.metric)
    numbers = sum(tensor.numel() for tensor in delta.tensors.values())
    assert (told["method"], told["trainable"]) == (name, numbers)
    assert f"{name} trains {numbers:,} numbers (" in done.stderr
    assert not (tmp_path / "out" / "counting.safetensors").exists()


def test_a_baseline_is_not_published(tmp_path: Path) -> None:
    refused = train(tmp_path, "bitfit", "--push")
    assert refused.exit_code == 1
    assert "only prompts are published, and bitfit trains weights" in refused.stderr
    assert not (tmp_path / "out").exists()
