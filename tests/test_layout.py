"""The top-level folders are not packages: an import name `kernels` would shadow somebody else's."""

from __future__ import annotations

from pathlib import Path

from shared_files import ROOT

NOT_PACKAGES = ("kernels", "server", "prompts", "clients", "tests", "tests/kernels")


def misplaced(root: Path) -> list[str]:
    return [folder for folder in NOT_PACKAGES if (root / folder / "__init__.py").exists()]


def test_no_top_level_folder_is_a_package() -> None:
    assert misplaced(ROOT) == []


def test_the_rule_sees_a_planted_package(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    assert misplaced(tmp_path) == ["kernels"]
