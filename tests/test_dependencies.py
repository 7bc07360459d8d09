"""What is imported is declared, what is declared is used, and whatever an installation brings is pinned."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution, packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from shared_files import ROOT

RUNTIME = ("server/promptmux_server", "kernels/promptmux_kernels", "prompts/promptmux_prompts")
OURS = {"promptmux-server", "promptmux"}
TAKEN_BY_NAME = {"httptools", "uvloop"}
"""uvicorn uses them where they are installed; no import of ours shows it."""


def project() -> dict[str, list[str]]:
    """The root distribution's requirements: `runtime`, and each extra by its name."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"runtime": table["dependencies"], **table["optional-dependencies"]}


def names(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def imported_modules(source: str) -> set[str]:
    """Top-level names of the absolute imports in `source`, lazy ones included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names


def imported_distributions(folders: Iterable[str]) -> set[str]:
    provided = packages_distributions()
    modules = set[str]()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            modules |= imported_modules(path.read_text(encoding="utf-8"))
    return {canonicalize_name(name) for module in modules for name in provided.get(module, ())}


def test_every_import_of_the_server_is_declared_and_every_declaration_used() -> None:
    """What only the Triton form, or only a search imports, and nothing else may, is declared by an extra."""
    optional = names(project()["gpu"]) | names(project()["train"])
    used = imported_distributions(RUNTIME) | TAKEN_BY_NAME
    assert used - optional == names(project()["runtime"]) - OURS
    assert used & optional == optional


LAZY = {
    "triton": ("kernels/promptmux_kernels/triton_ops", "kernels/promptmux_kernels/bench"),
    "optuna": ("server/promptmux_server/training/search",),
    "matplotlib": ("server/promptmux_server/training/search",),
}
"""Packages that only extras bring, and the folders whose modules may import them."""


@pytest.mark.parametrize("package", LAZY)
def test_the_optional_imports_stay_in_the_packages_that_are_imported_lazily(package: str) -> None:
    lazy = {ROOT / folder for folder in LAZY[package]}
    importers = {
        path
        for folder in RUNTIME
        for path in (ROOT / folder).rglob("*.py")
        if package in imported_modules(path.read_text(encoding="utf-8"))
    }
    assert importers
    assert [path for path in sorted(importers) if not lazy & set(path.parents)] == []


def test_every_import_of_the_tests_is_declared() -> None:
    client = tomllib.loads((ROOT / "clients/python/pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = names(project()["runtime"]) | names(project()["dev"]) | names(client["dependencies"]) | OURS
    assert imported_distributions(["tests", "clients/python/tests"]) - declared == set()


def test_lazy_and_nested_imports_are_seen() -> None:
    source = "def f():\n    import torch.nn\n    from PIL.Image import open\n    from . import near\n    import os\n"
    assert imported_modules(source) == {"torch", "PIL"}


def pins(text: str) -> dict[str, Version]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def unpinned(constraints: dict[str, Version], requirements: Iterable[str]) -> list[str]:
    """Walk what is installed, from `requirements` down: what is not pinned, or pinned out of a declared range."""
    faults, waiting, seen = set(), [Requirement(line) for line in requirements], set[tuple[str, frozenset[str]]]()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
            continue
        if name not in OURS and not (name in constraints and constraints[name] in requirement.specifier):
            faults.add(f"{name}{requirement.specifier}")
        if (name, extras) not in seen:
            seen.add((name, extras))
            waiting += needed_by(name, extras)
    return sorted(faults)


def needed_by(name: str, extras: frozenset[str]) -> list[Requirement]:
    found = [Requirement(line) for line in distribution(name).requires or ()]
    environments = [{"extra": extra} for extra in ("", *extras)]
    return [r for r in found if r.marker is None or any(r.marker.evaluate(environment) for environment in environments)]


@pytest.fixture
def constraints() -> dict[str, Version]:
    return pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))


def test_whatever_an_installation_brings_is_pinned_within_its_range(constraints: dict[str, Version]) -> None:
    assert unpinned(constraints, [line for lines in project().values() for line in lines]) == []


def test_what_is_installed_here_is_what_is_pinned(constraints: dict[str, Version]) -> None:
    """A local version such as +cpu is the same release, built otherwise."""
    runtime = sorted(names(project()["runtime"]) - OURS)
    installed = {name: Version(Version(distribution(name).version).public) for name in runtime}
    assert installed == {name: constraints[name] for name in runtime}


def test_a_missing_pin_and_one_out_of_range_are_seen(constraints: dict[str, Version]) -> None:
    del constraints["starlette"]
    constraints["pillow"] = Version("12.3.0")
    faults = unpinned(constraints, project()["runtime"])
    assert {re.split(r"[<>=!~]", fault)[0] for fault in faults} == {"starlette", "pillow"}


def test_the_pinned_pillow_has_the_decompression_bomb_checks_of_13_0_0(constraints: dict[str, Version]) -> None:
    assert constraints["pillow"] >= Version("13.0.0")
    declared = [Requirement(line) for line in project()["runtime"]]
    assert [r.specifier.contains("12.3.0") for r in declared if r.name == "pillow"] == [False]


def test_torch_is_pinned_without_a_local_build(constraints: dict[str, Version]) -> None:
    """So that pip may take whichever build of the release its index offers, the CPU one included."""
    assert constraints["torch"].local is None


def test_no_constraint_names_a_place() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert "@" not in text
