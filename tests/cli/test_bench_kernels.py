"""`promptmux bench kernels` prints floors anywhere, says where nothing can be timed, and fails on a missed bar."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from promptmux_kernels.bench import bars, compiled
from promptmux_server.cli import app


def entry(spills: int) -> Any:
    """A small kernel as the compiler would report it."""
    report = compiled.Compiled(32, 0, spills, 0, 16, Counter({"LDG.128": 2}))
    widths = SimpleNamespace(head_dim=64, dtype=torch.bfloat16)
    launch = SimpleNamespace(config=SimpleNamespace(rows=1, keys=64, warps=1, stages=1, descriptor=False))
    return bars.Entry(SimpleNamespace(name="gelu_norm", widths=widths, launch=launch), "sm_90", report)  # type: ignore[arg-type]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_floors_are_printed_and_the_reason_is_said() -> None:
    result = CliRunner().invoke(app, ["bench", "kernels", "--json"])
    assert result.exit_code == 0
    assert "no GPU is visible" in result.stderr
    printed = json.loads(result.stdout)
    assert printed["timings"] == []
    assert {line["op"] for line in printed["floors"]} >= {"prefix_attention", "cross_decode_attention", "gelu_norm"}


@pytest.mark.usefixtures("no_gpu")
def test_the_table_is_for_people() -> None:
    result = CliRunner().invoke(app, ["bench", "kernels"])
    assert result.exit_code == 0
    assert "OFA-large" in result.stdout


def test_compiling_writes_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "compile_all", lambda targets: [entry(spills=0)])
    target = tmp_path / "compiled.md"
    result = CliRunner().invoke(app, ["bench", "kernels", "--compile", "--document", str(target)])
    assert result.exit_code == 0
    assert "| gelu_norm | 64 bfloat16 | 1x64, 1, 1 | 32 | 0 | 0 | 0.0 | 16 | - | - | 2 LDG.128 |" in target.read_text()


def test_a_missed_bar_ends_with_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "compile_all", lambda targets: [entry(spills=3)])
    result = CliRunner().invoke(app, ["bench", "kernels", "--compile", "--document", str(tmp_path / "compiled.md")])
    assert result.exit_code == 1
    assert "spills: 3" in result.stderr


def test_a_target_that_nobody_knows_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "kernels", "--compile", "--target", "sm_1"])
    assert result.exit_code == 1
    assert "choose from sm_80, sm_90, sm_100, gfx942" in result.stderr
