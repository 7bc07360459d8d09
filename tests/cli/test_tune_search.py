"""`promptmux tune-search` as a new user runs it: the example of docs/search.md, word for word, with fewer trials."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from promptmux_prompts import load_manifest
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.cli import app
from promptmux_server.pocket import WEIGHTS
from shared_files import ROOT
from training.data.data_files import pictures

GUIDE = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
FEWER = {"steps = 300": "steps = 2", "trials = 24": "trials = 3", "at_once = 8": "at_once = 2\nrungs = [1]"}
ENVIRONMENT = {"COLUMNS": "200", "NO_COLOR": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A new user's folder of 10 pictures."""
    pictures(tmp_path / "pets", 10)
    lines = [
        {"image": f"{i}.png", "text": "what animal is it?", "answer": "dog" if i % 2 else "cat"} for i in range(10)
    ]
    (tmp_path / "pets.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = re.search(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    assert found is not None
    config = found[1]
    for before, after in FEWER.items():
        assert before in config
        config = config.replace(before, after)
    (tmp_path / "pets-search.toml").write_text(config + "\n[run]\nrows = 1\n\n[machine]\nthreads = 1\n")
    return tmp_path


@pytest.fixture(autouse=True)
def threads_of_other_tests() -> Iterator[None]:
    """The command takes all cores of its process, which here is everybody's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments], env=ENVIRONMENT)


def test_the_guides_example_makes_a_prompt_a_report_and_plots(folder: Path) -> None:
    done = command("tune-search", str(folder / "pets-search.toml"), "--json")
    assert done.exit_code == 0, done.output
    told, output = json.loads(done.stdout), folder / "runs/pets-search"
    manifest = load_manifest(output / "pets.safetensors", shape=load_backbone(WEIGHTS).prompt_shape, fingerprint=None)
    assert told["metric"] == manifest.metric
    assert told["best"]["state"] == "complete"
    assert manifest.provenance["search"] == {
        "trial": told["best"]["number"],
        "trials": 3,
        "values": told["best"]["values"],
    }
    assert manifest.encoder_length == told["best"]["values"]["encoder_length"]
    assert manifest.provenance["learning_rate"] == told["best"]["values"]["learning_rate"]
    report = json.loads((output / "report.json").read_text())
    assert [trial["number"] for trial in report["trials"]] == [0, 1, 2]
    assert report["best"] == told["best"]
    assert "trial 0 begins: learning_rate" in done.stderr
    check_plots(output, ("curves", "slices"))

    (output / "report.json").unlink()
    (output / "curves.png").unlink()
    again = command("tune-report", str(output))
    assert again.exit_code == 0, again.output
    assert json.loads((output / "report.json").read_text()) == report
    check_plots(output, ("curves", "slices"))
    repeated = command("tune-search", str(folder / "pets-search.toml"))
    assert "promptmux prompts push" in repeated.stdout
    assert (
        load_manifest(output / "pets.safetensors", shape=load_backbone(WEIGHTS).prompt_shape, fingerprint=None)
        == manifest
    )


def check_plots(folder: Path, names: tuple[str, ...]) -> None:
    """They are there, and are no blank sheets."""
    for name in names:
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 700
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")


def test_a_mistake_ends_with_one_message(folder: Path) -> None:
    path = folder / "pets-search.toml"
    path.write_text(path.read_text().replace("dropout =", "drop_out ="))
    refused = command("tune-search", str(path))
    assert refused.exit_code == 1
    assert (
        "pets-search.toml, line 30: search.space.drop_out: there is no such field here; did you mean" in refused.stderr
    )
    assert "no journal of a search" in command("tune-report", str(folder)).stderr


@pytest.mark.parametrize("package", ["optuna", "matplotlib"])
def test_a_missing_extra_is_named(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused = command("tune-search", str(folder / "pets-search.toml"))
    assert refused.exit_code == 1
    assert f"needs {package}, which is not installed: pip install 'promptmux-server[train]'" in refused.stderr


def test_a_server_imports_nothing_of_a_search() -> None:
    code = (
        "import sys, promptmux_server.cli, promptmux_server.cli.process, promptmux_server.cli.working\n"
        "print(sorted({'optuna', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_help_shows_an_example() -> None:
    shown = command("tune-search", "--help")
    assert "promptmux tune-search pets-search.toml --push" in " ".join(shown.output.split())
