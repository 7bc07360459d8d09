"""`promptmux train` as a new user runs it: the example of docs/training.md, word for word, with fewer steps."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from promptmux_prompts import PromptShape, load_manifest
from promptmux_server.cli import app
from promptmux_server.pocket import WEIGHTS
from promptmux_server.training import run as run_module
from promptmux_server.training.job import held
from promptmux_server.training.job_config import read_job
from promptmux_server.training.run import Run
from shared_files import ROOT
from training.data.data_files import pictures

GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
STEPS = "\nsteps = 300\n"


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A new user's folder of 50 pictures."""
    pictures(tmp_path / "pets", 50)
    first, second = (json.loads(line) for line in block("json").splitlines())
    lines = [{**(second if i % 2 else first), "image": f"{i}.png"} for i in range(50)]
    (tmp_path / "pets.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = block("toml")
    assert STEPS in config
    fewer = config.replace(STEPS, "\nsteps = 4\n") + "\n[run]\nvalidate_every = 4\n\n[machine]\nthreads = 1\n"
    (tmp_path / "pets.toml").write_text(fewer)
    return tmp_path


@pytest.fixture(autouse=True)
def threads_of_other_tests() -> Iterator[None]:
    """The command takes all cores of its process, which here is everybody's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(folder: Path, *arguments: str) -> Result:
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["train", str(folder / "pets.toml"), *arguments], env=environment)


def shape() -> PromptShape:
    config = json.loads((WEIGHTS / "config.json").read_text())
    heads = config["heads"]
    return PromptShape(config["encoder_layers"], config["decoder_layers"], heads, config["d_model"] // heads)


def test_the_guides_example_makes_a_prompt_with_its_origin(folder: Path) -> None:
    done = train(folder, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    output = folder / "runs" / "pets"
    manifest = load_manifest(output / "pets.safetensors", shape=shape(), fingerprint=None)
    assert told["metric"] == manifest.metric
    assert manifest.answers == ("cat", "dog")
    assert manifest.metric is not None
    assert manifest.metric["name"] == "accuracy"
    assert manifest.provenance["begun_from"] == " what animal is it?"
    assert manifest.provenance["samples"] + manifest.metric["n"] == 50
    assert manifest.canary is not None
    assert all(canary.image is not None and canary.text == "what animal is it?" for canary in manifest.canary)
    assert (output / "config.toml").read_text() == (folder / "pets.toml").read_text()
    steps = [json.loads(line)["step"] for line in (output / "curve.jsonl").read_text().splitlines() if "nll" in line]
    assert steps == [1, 2, 3, 4]
    assert "step 4 of 4" in done.stderr
    again = train(folder, "--json")
    assert json.loads(again.stdout) == told
    assert "goes on from step 4" in again.stderr


def test_an_interrupted_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absorb = Run.absorb

    def interrupted(run: Run, loss: run_module.LossNumbers) -> object:
        report = absorb(run, loss)
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return report

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(Run, "absorb", interrupted)
        stopped = train(folder)
    assert stopped.exit_code == 130, stopped.output
    assert "stopped behind step 2" in stopped.stderr
    assert signal.getsignal(signal.SIGINT) is before
    assert not (folder / "runs/pets/pets.safetensors").exists()
    done = train(folder)
    assert done.exit_code == 0, done.output
    assert "goes on from step 2" in done.stderr
    assert "pets.safetensors: accuracy" in done.stdout


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('answers = ["cat", "dog"]', 'answers = ["cat"]', "pets.jsonl: 25 of 50 lines cannot be used"),
        ("heldout = 0.2", "holdout = 0.2", "pets.toml, line 9: data.holdout: there is no such field here"),
        ('kind = "answer"', 'kind = "box"', "pets.jsonl, line 1"),
        ('name = "pets"', 'name = "My Pets"', "There can be no such task: name must match"),
        ('output = "runs/pets"', 'output = "runs"\nbackbone = "nowhere"', "no backbone"),
        ("[machine]", '[machine]\ndevice = "cuda:7"', "machine.device: there is no such device"),
    ],
)
def test_a_mistake_ends_with_one_message(folder: Path, before: str, after: str, said: str) -> None:
    path = folder / "pets.toml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    refused = train(folder)
    assert refused.exit_code == 1
    assert said in refused.stderr
    assert "Traceback" not in refused.output


def test_a_folder_that_is_held_is_said_before_anything_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing is opened here")

    monkeypatch.setattr("promptmux_server.training.job_parts.open_backbone", refuse)
    with held(read_job(folder / "pets.toml")[0]):
        done = train(folder)
    assert done.exit_code == 1
    assert "Another process trains into this folder" in done.stderr


def test_help_shows_an_example() -> None:
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"})
    assert "promptmux train pets.toml --push" in " ".join(shown.output.split())
