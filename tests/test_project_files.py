"""The files that a newcomer and a machine start from: Makefile, .ci/run, the documents, the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared_files import ROOT

TARGETS = set(["install", "format", "lint", "types", "test", "bench", "demo", "serve", "soak", "art", "pretrain"])
NEEDS_NO_INSTALLATION = {"install", "art"}
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "clients/python/README.md", "docs/architecture.md")


@dataclass(frozen=True)
class Target:
    """A phony target of the Makefile."""

    prerequisites: list[str]
    recipe: list[str]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def targets(makefile: str) -> dict[str, Target]:
    found: dict[str, Target] = {}
    for head, recipe in re.findall(r"^([a-z.][^:=\n]*:(?!=)[^\n]*)\n((?:\t[^\n]*\n)*)", makefile, re.MULTILINE):
        name, _, needs = head.partition(":")
        found[name] = Target(needs.split(), recipe.splitlines())
    del found[".PHONY"]
    return found


def makefile_faults(makefile: str, root: Path) -> list[str]:
    """Long recipes, targets that forget the installation, files and modules that are not there."""
    faults = []
    for name, target in targets(makefile).items():
        if len(target.recipe) > 3:
            faults.append(f"{name}: more than three lines")
        if "/" not in name and name not in NEEDS_NO_INSTALLATION and "install" not in target.prerequisites:
            faults.append(f"{name}: does not install first")
        for line in target.recipe:
            modules = (module.replace(".", "/") for module in re.findall(r"-m (promptmux_server[\w.]*)", line))
            files = [f"server/{module}.py" for module in modules] + re.findall(r"[\w/]+\.(?:py|sh|txt)\b", line)
            faults += [f"{name}: no {file}" for file in files if not (root / file).exists()]
    return faults


def test_the_makefile_has_a_short_self_sufficient_target_for_each_habit() -> None:
    assert targets(read("Makefile")).keys() >= TARGETS
    assert makefile_faults(read("Makefile"), ROOT) == []


@pytest.mark.parametrize(
    ("planted", "fault"),
    [
        ("long: install\n\ta\n\tb\n\tc\n\td\n", "long: more than three lines"),
        ("alone:\n\tpytest\n", "alone: does not install first"),
        ("lost: install\n\tpython examples/lost.py\n", "lost: no examples/lost.py"),
        ("lost: install\n\tpython -m promptmux_server.lost\n", "lost: no server/promptmux_server/lost.py"),
    ],
)
def test_a_fault_planted_in_the_makefile_is_seen(planted: str, fault: str) -> None:
    assert fault in makefile_faults(f"{read('Makefile')}\n{planted}", ROOT)


def commands(document: str) -> set[str]:
    """The `make` targets that a document tells its reader to type."""
    return set(re.findall(r"(?:^|`|&& )make ([a-z-]+(?: [a-z-]+)*)", document, re.MULTILINE))


def dead_links(document: str, folder: Path) -> list[str]:
    linked = re.findall(r"\]\(([^)#\s]+)", document)
    return [link for link in linked if not re.match(r"[a-z]+:", link) and not (folder / link).exists()]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_names_only_commands_and_files_that_exist(name: str) -> None:
    named = {word for command in commands(read(name)) for word in command.split()}
    assert named - targets(read("Makefile")).keys() == set()
    assert dead_links(read(name), (ROOT / name).parent) == []


def test_a_dead_link_and_a_dead_command_are_seen(tmp_path: Path) -> None:
    assert dead_links("[a](gone.md) [b](https://example.org/x)", tmp_path) == ["gone.md"]
    assert commands("```\nmake dmeo\n```\nor `make lint types`") == {"dmeo", "lint types"}


def test_contributing_fits_one_screen() -> None:
    assert len(read("CONTRIBUTING.md").splitlines()) <= 40


def test_the_changelog_keeps_its_form() -> None:
    headings = re.findall(r"^(#+) (.*)$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[:2] == [("#", "Changelog"), ("##", "[Unreleased]")]
    kinds = {title for level, title in headings if level == "###"}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("status", [0, 3])
def test_ci_makes_lint_types_test_from_anywhere_without_input_and_passes_the_status_on(
    tmp_path: Path, status: int
) -> None:
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$@"; pwd; cat; exit {status}\n', encoding="utf-8")
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CI": "true"}
    result = subprocess.run(
        [ROOT / ".ci" / "run"],
        cwd=tmp_path,
        env=environment,
        input="typed",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.stdout.splitlines() == ["lint types test", str(ROOT)]
    assert result.returncode == status


def test_the_wheel_carries_the_backbone_and_the_prompts_where_the_code_looks_for_them(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        tree.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree)
    for planted in (
        "kernels/promptmux_kernels/__init__.py",
        "prompts/promptmux_prompts/__init__.py",
        "prompts/library/some-task.safetensors",
        "server/promptmux_server/__init__.py",
        "server/promptmux_server/pocket/weights/model.safetensors",
        "server/promptmux_server/pocket/weights/vocab.json",
        "tests/test_nothing.py",
    ):
        (tree / planted).parent.mkdir(parents=True, exist_ok=True)
        (tree / planted).touch()
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=tree, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("promptmux_server-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if ".dist-info/" not in name) == [
        "promptmux_kernels/__init__.py",
        "promptmux_prompts/__init__.py",
        "promptmux_server/__init__.py",
        "promptmux_server/pocket/library/some-task.safetensors",
        "promptmux_server/pocket/weights/model.safetensors",
        "promptmux_server/pocket/weights/vocab.json",
    ]
    assert [name for name in names if name.endswith("licenses/LICENSE")] != []
