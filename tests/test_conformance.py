"""The released model's outputs are reproduced, and the program that says so notices when they are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import conformance
from shared_files import golden_dir


def test_every_golden_case_agrees_in_both_forms() -> None:
    missed = [check for check in conformance.run(golden_dir()) if not check.passed]
    assert missed == []


CORRUPTED = ["logits", "encoder_out", "allcand_scores", "grad/encoder.encoder_prompt_encoder.embedding.weight"]


@pytest.mark.parametrize("name", [f"both/{name}" for name in CORRUPTED])
def test_one_corrupted_number_is_a_miss(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path in golden_dir().glob("adapter.*"):
        shutil.copyfile(path, tmp_path / path.name)
    tensors = load_file(tmp_path / "adapter.cases.safetensors")
    tensors[name].view(-1)[7 % tensors[name].numel()] += 0.05 * tensors[name].abs().max()
    save_file(tensors, tmp_path / "adapter.cases.safetensors")
    assert conformance.main([str(tmp_path)]) == 1
    assert '"passed": false' in capsys.readouterr().out


def test_an_empty_directory_is_not_a_pass(tmp_path: Path) -> None:
    assert conformance.main([str(tmp_path)]) == 1
