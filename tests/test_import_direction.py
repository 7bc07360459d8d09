"""The import contract of pyproject.toml holds, and notices each kind of import that it forbids."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared_files import ROOT

FOLDERS = {
    "promptmux_server": "server",
    "promptmux_kernels": "kernels",
    "promptmux_prompts": "prompts",
    "promptmux": "clients/python",
}


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """import-linter over the packages in `root`, whichever copy is installed."""
    path = os.pathsep.join(str(root / folder) for folder in FOLDERS.values())
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def copied_tree(tmp_path: Path) -> Path:
    """The sources alone, without their data."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package, folder in FOLDERS.items():
        for source in (ROOT / folder / package).rglob("*.py"):
            copy = tmp_path / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    return tmp_path


def plant(root: Path, importer: str, imported: str) -> None:
    """Add the module `importer`, which imports `imported`, and the package around it if there is none."""
    package, *inner, name = importer.split(".")
    folder = (root / FOLDERS[package] / package).joinpath(*inner)
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    (folder / f"{name}.py").write_text(f"import {imported}\n", encoding="utf-8")


def test_the_tree_keeps_the_contract() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout


FORBIDDEN = [
    ("promptmux_server.tasks.planted", "promptmux_server.engine.request"),
    ("promptmux_server.backbone.planted", "promptmux_server.tasks.text"),
    ("promptmux_server.training.planted", "promptmux_server.engine.scheduler"),
    ("promptmux_server.engine.planted", "promptmux_server.training.loss"),
    ("promptmux_server.evaluation.planted", "promptmux_server.api.errors"),
    ("promptmux_server.jobs.planted", "promptmux_server.cli.output"),
    ("promptmux_server.api.planted", "promptmux"),
    ("promptmux_kernels.planted", "promptmux_prompts.errors"),
    ("promptmux_prompts.planted", "promptmux_kernels.rows"),
    ("promptmux_prompts.planted_too", "promptmux_server.errors"),
    ("promptmux.planted", "promptmux_server.errors"),
]


def test_each_forbidden_import_is_noticed(copied_tree: Path) -> None:
    for importer, imported in FORBIDDEN:
        plant(copied_tree, importer, imported)
    result = lint(copied_tree)
    assert result.returncode == 1
    reported = result.stdout.replace("\n", " ")
    assert [pair for pair in FORBIDDEN if f"{pair[0]} -> {pair[1]}" not in reported] == []


@pytest.mark.parametrize("leaf", ["errors", "settings"])
def test_a_leaf_that_imports_something_of_ours_is_noticed(copied_tree: Path, leaf: str) -> None:
    with (copied_tree / f"server/promptmux_server/{leaf}.py").open("a", encoding="utf-8") as file:
        file.write("import promptmux_prompts.errors\nimport promptmux_server.tasks.text\n")
    result = lint(copied_tree)
    assert result.returncode == 1
    for imported in ("promptmux_prompts.errors", "promptmux_server.tasks.text"):
        assert f"promptmux_server.{leaf} -> {imported}" in result.stdout


def test_a_new_package_without_a_place_among_the_layers_is_noticed(copied_tree: Path) -> None:
    plant(copied_tree, "promptmux_server.novelty.planted", "json")
    result = lint(copied_tree)
    assert result.returncode == 1
    assert "novelty" in result.stdout
