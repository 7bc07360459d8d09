"""PEFT directories written by hand: the layouts slot by slot, and every refusal with what to do instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

import tiny
from promptmux_prompts import InvalidPromptFile, PromptShape, PromptShapeMismatch
from promptmux_prompts.errors import ImportRefused
from promptmux_prompts.importers import ImportedSides, import_peft

LENGTH, HEADS, HEAD_DIM = 5, 2, 4
CAUSAL: dict[str, Any] = {
    "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_transformer_submodules": 1, "num_layers": 3,
    "num_attention_heads": HEADS, "token_dim": HEADS * HEAD_DIM, "num_virtual_tokens": LENGTH,
    "base_model_name_or_path": "OFA-Sys/ofa-toy", "prefix_projection": False, "peft_version": "0.21.2",
}  # fmt: skip
SEQ2SEQ = CAUSAL | {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2}


def numbered_slots(layers: int) -> Tensor:
    """A table in which every number says its slot."""
    return torch.arange(2 * layers).repeat_interleave(HEADS * HEAD_DIM).expand(LENGTH, -1).float()


def write(
    directory: Path, config: dict[str, Any], table: Tensor | None = None, *, file: str = "adapter_model.safetensors"
) -> Path:
    (directory / "adapter_config.json").write_text(json.dumps(config))
    table = numbered_slots(config.get("num_layers", 3)) if table is None else table
    (directory / file).write_bytes(save({"prompt_embeddings": table.contiguous()}))
    return directory


def take(directory: Path, layers: int = 3, **options: Any) -> ImportedSides:
    options = {"backbone_name": "ofa-toy"} | options
    return import_peft(directory, PromptShape(layers, layers, HEADS, HEAD_DIM), **options)


def slots(side: tuple[Tensor, Tensor]) -> list[tuple[int, int]]:
    """Which slots each layer's K and V came from."""
    assert all(len(layer.unique()) == 1 for tensor in side for layer in tensor)
    return [(int(key.flatten()[0]), int(value.flatten()[0])) for key, value in zip(*side, strict=True)]


@pytest.mark.parametrize(
    ("config", "layers", "expected"),
    [
        (CAUSAL, 3, [(0, 1), (2, 3), (4, 5)]),
        (SEQ2SEQ, 2, [(0, 1), (0, 1)]),
        (SEQ2SEQ, 3, [(0, 1), (4, 5), (2, 3)]),
        (SEQ2SEQ, 6, [(0, 1), (4, 5), (8, 9), (0, 1), (4, 5), (8, 9)]),
        (SEQ2SEQ | {"num_transformer_submodules": None}, 3, [(0, 1), (4, 5), (2, 3)]),
        (CAUSAL | {"num_transformer_submodules": None}, 2, [(0, 1), (2, 3)]),
    ],
    ids=["causal", "seq2seq 2", "seq2seq 3", "seq2seq 6", "seq2seq by its task", "causal by its task"],
)
def test_each_layer_takes_the_slots_that_peft_gives_it(
    config: dict[str, Any], layers: int, expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    sides = take(write(tmp_path, config | {"num_layers": layers}), layers)
    assert slots(sides.decoder) == expected
    assert sides.encoder[0].shape == (layers, HEADS, 0, HEAD_DIM)


def test_heads_and_positions_lie_where_peft_puts_them(tmp_path: Path) -> None:
    table = torch.randn(LENGTH, 2 * 3 * HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(2))
    key, value = take(write(tmp_path, CAUSAL, table)).decoder
    view = table.view(LENGTH, 6, HEADS, HEAD_DIM)
    assert torch.equal(key[2, 1, 4], view[4, 4, 1])
    assert torch.equal(value[0, 0, 3], view[3, 1, 0])


def test_a_one_sided_models_prefix_may_go_to_the_encoder_and_a_seq2seq_one_may_not(tmp_path: Path) -> None:
    sides = take(write(tmp_path, CAUSAL), side="encoder")
    assert slots(sides.encoder) == [(0, 1), (2, 3), (4, 5)]
    assert sides.decoder[0].shape[2] == 0
    with pytest.raises(ImportRefused, match="never gives"):
        take(write(tmp_path, SEQ2SEQ), side="encoder")


def test_the_manifest_says_where_a_prefix_came_from(tmp_path: Path) -> None:
    prompt = take(write(tmp_path, SEQ2SEQ)).prompt(tiny.prompt().manifest)
    assert prompt.manifest.provenance["source"] == {
        "format": "peft", "layout": "seq2seq", "peft_version": "0.21.2", "base_model": "ofa-toy",
        "prefix_projection": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("PROMPT_TUNING", "has no place in the input.*Train the task with PREFIX_TUNING"),
        ("P_TUNING", "made by an MLP.*Train the task with PREFIX_TUNING"),
        ("MULTITASK_PROMPT_TUNING", "low-rank matrix.*Train the task with PREFIX_TUNING"),
        ("LORA", "merge it there"),
        ("SOMETHING_NEW", "learns no prefix"),
        (7, "learns no prefix"),
        (None, "learns no prefix"),
    ],
)
def test_another_kind_of_adapter_is_refused_with_why_and_what_to_do(kind: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=said):
        take(write(tmp_path, CAUSAL | {"peft_type": kind}))


@pytest.mark.parametrize("base", ["OFA-Sys/ofa-toy", "/models/OFA-Toy/", "ofa-toy", "C:\\models\\ofa-toy"])
def test_a_base_model_of_the_backbones_name_is_accepted_wherever_it_lay(base: str, tmp_path: Path) -> None:
    assert take(write(tmp_path, CAUSAL | {"base_model_name_or_path": base})).origin["base_model"].lower() == "ofa-toy"


@pytest.mark.parametrize("base", ["t5-small", "OFA-Sys/ofa-toy-2", "", None, 3])
def test_another_base_model_needs_somebody_to_vouch_for_it(base: object, tmp_path: Path) -> None:
    directory = write(tmp_path, CAUSAL | {"base_model_name_or_path": base})
    with pytest.raises(ImportRefused, match="--same-backbone"):
        take(directory)
    assert take(directory, backbone_name=None)


@pytest.mark.parametrize(
    "change",
    [{"num_layers": 4}, {"num_attention_heads": 4}, {"token_dim": 16}, {"num_virtual_tokens": 6}, {"num_layers": "3"}],
    ids=str,
)
def test_an_adapter_for_another_size_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PromptShapeMismatch, match=next(iter(change))):
        take(write(tmp_path, CAUSAL | change, numbered_slots(3)))


@pytest.mark.parametrize("table", [numbered_slots(4), torch.zeros(300, 48), torch.zeros(0, 48), torch.zeros(2, 5, 48)])
def test_a_table_of_another_size_than_its_configuration_is_refused(table: Tensor, tmp_path: Path) -> None:
    with pytest.raises(PromptShapeMismatch):
        take(write(tmp_path, CAUSAL, table))


def test_a_pickle_is_not_read_and_the_way_out_is_named(tmp_path: Path) -> None:
    write(tmp_path, CAUSAL, file="adapter_model.bin")
    with pytest.raises(ImportRefused, match=r"not read.*save_pretrained"):
        take(tmp_path)


def test_modules_that_replace_the_backbones_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="stays frozen"):
        take(write(tmp_path, CAUSAL | {"modules_to_save": ["classifier"]}))


def test_tensors_beside_the_prefix_are_refused(tmp_path: Path) -> None:
    write(tmp_path, CAUSAL)
    both = save({"prompt_embeddings": numbered_slots(3).contiguous(), "classifier.weight": torch.zeros(2)})
    (tmp_path / "adapter_model.safetensors").write_bytes(both)
    with pytest.raises(ImportRefused, match="nothing else"):
        take(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), ImportRefused),
        (lambda d: (d / "adapter_config.json").write_text("[]"), ImportRefused),
        (lambda d: (d / "adapter_config.json").write_text("{"), InvalidPromptFile),
        (lambda d: (d / "adapter_config.json").write_text(" " * (1 << 20) + "{}"), ImportRefused),
        (lambda d: (d / "adapter_model.safetensors").unlink(), ImportRefused),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      "), ImportRefused),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x80\x04N."), ImportRefused),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(bytes(1 << 20)), PromptShapeMismatch),
    ],
    ids=["no config", "a list", "no json", "huge config", "no weights", "no tensors", "pickle inside", "huge weights"],
)
def test_a_broken_directory_is_refused(spoil: Any, error: type[Exception], tmp_path: Path) -> None:
    write(tmp_path, CAUSAL)
    assert take(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error):
        take(tmp_path)
