"""What a reader may rely on anywhere in the tree: which folders are no packages, headers, names of test files."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from shared_files import ROOT

NOT_PACKAGES = ("kernels", "server", "prompts", "clients", "tests", "tests/kernels")
"""An import name `kernels` would shadow somebody else's package."""

SOURCES = ("kernels", "server", "prompts", "clients", "tests", "benchmarks", "examples")


def misplaced(root: Path) -> list[str]:
    return [folder for folder in NOT_PACKAGES if (root / folder / "__init__.py").exists()]


def python_files(root: Path) -> Iterable[Path]:
    return (path for folder in SOURCES for path in sorted((root / folder).rglob("*.py")))


def headless(root: Path) -> list[str]:
    """Modules that hold code but do not open with a docstring."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in python_files(root)}
    return [str(path.relative_to(root)) for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)]


def same_stems(root: Path) -> dict[str, list[str]]:
    """Test files that share a stem: a report that names one would not say which."""
    places = defaultdict(list)
    for path in python_files(root):
        if path.name.startswith("test_"):
            places[path.stem].append(str(path.relative_to(root)))
    return {stem: paths for stem, paths in places.items() if len(paths) > 1}


def write(root: Path, name: str, content: str = "") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content, encoding="utf-8")


def test_no_top_level_folder_is_a_package() -> None:
    assert misplaced(ROOT) == []


def test_the_rule_sees_a_planted_package(tmp_path: Path) -> None:
    for folder in NOT_PACKAGES:
        write(tmp_path, f"{folder}/__init__.py")
    assert misplaced(tmp_path) == list(NOT_PACKAGES)


def test_every_module_opens_with_what_it_owns() -> None:
    assert headless(ROOT) == []


def test_a_module_without_header_is_seen(tmp_path: Path) -> None:
    write(tmp_path, "server/a.py", "import os\n")
    write(tmp_path, "server/b.py", '"""Owns nothing."""\n\nimport os\n')
    write(tmp_path, "server/empty.py")
    assert headless(tmp_path) == ["server/a.py"]


def test_test_files_have_unique_stems() -> None:
    assert same_stems(ROOT) == {}


def test_a_repeated_stem_is_seen(tmp_path: Path) -> None:
    write(tmp_path, "tests/api/test_a.py")
    write(tmp_path, "clients/python/tests/test_a.py")
    assert same_stems(tmp_path) == {"test_a": ["clients/python/tests/test_a.py", "tests/api/test_a.py"]}
