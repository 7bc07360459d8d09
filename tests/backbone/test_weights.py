"""Backbone files: formats, conversions, and files that mean harm."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from promptmux_prompts import PromptShape, load_prompt
from promptmux_server.backbone.config import BackboneConfig, ConfigError
from promptmux_server.backbone.sizes import OFA_SIZES
from promptmux_server.backbone.vision import VisionStem
from promptmux_server.backbone.weights import convert, fold_batch_norm, load_backbone, write_backbone
from promptmux_server.backbone.weights.names import expected_shapes, from_transformers
from promptmux_server.backbone.weights.pickles import read_pickle
from promptmux_server.errors import BackboneFileError, BackboneKeysError, BackboneNotFound, UnsafePickle
from shared_files import golden_dir


def test_our_format_survives_a_round_trip(tmp_path: Path) -> None:
    write_backbone(tmp_path / "tiny", tiny.backbone())
    again = load_backbone(tmp_path / "tiny")
    assert again.config == tiny.config()
    assert again.fingerprint == tiny.backbone().fingerprint


def test_the_fingerprint_sees_one_bit(tmp_path: Path) -> None:
    write_backbone(tmp_path / "tiny", tiny.backbone())
    tensors = load_file(tmp_path / "tiny" / "model.safetensors")
    tensors["encoder.pos_ln.bias"][3] += 1e-6
    save_file(tensors, tmp_path / "tiny" / "model.safetensors")
    assert load_backbone(tmp_path / "tiny").fingerprint != tiny.backbone().fingerprint


def test_wrong_tensors_are_all_listed(tmp_path: Path) -> None:
    write_backbone(tmp_path / "tiny", tiny.backbone())
    path = tmp_path / "tiny" / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.pos_ln.bias"], tensors["decoder.layer_norm.weight"]
    tensors["encoder.surprise"] = torch.zeros(2)
    tensors["encoder.image_proj.bias"] = torch.zeros(7)
    save_file(tensors, path)
    with pytest.raises(BackboneKeysError) as caught:
        load_backbone(tmp_path / "tiny")
    assert caught.value.missing == ("decoder.layer_norm.weight", "encoder.pos_ln.bias")
    assert caught.value.unexpected == ("encoder.surprise",)
    assert len(caught.value.misshaped) == 1
    assert "[7]" in str(caught.value)


def test_a_taken_destination_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(BackboneFileError, match="not empty"):
        write_backbone(tmp_path, tiny.backbone())
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_fairseq_checkpoint_becomes_a_backbone_and_its_prompt(tmp_path: Path) -> None:
    report = convert(golden_dir() / "fairseq_prefix.pt", tmp_path / "out")
    converted = load_backbone(tmp_path / "out")
    assert converted.fingerprint == report.fingerprint
    config = report.config
    shape = PromptShape(config.encoder_layers, config.decoder_layers, config.heads, config.head_dim)
    prompt = load_prompt(report.prompts[0], shape=shape, fingerprint=report.fingerprint, dtype=torch.float32)
    stored = load_file(golden_dir() / "plain.cases.safetensors")
    table = stored["both/prompt/encoder.encoder_prompt_encoder.embedding.weight"].float()
    # The literal layout of ofa-spec 4.2: [layer][K then V][head][head_dim] along the last axis.
    for layer, part, head, position in ((0, 0, 0, 0), (2, 1, 3, 4), (1, 0, 2, 1)):
        begin = ((layer * 2 + part) * config.heads + head) * config.head_dim
        side = (prompt.encoder_key, prompt.encoder_value)[part]
        assert torch.equal(side[layer, head, position], table[position, begin : begin + config.head_dim])


def test_a_checkpoint_whose_prompts_cannot_be_had_is_not_converted(tmp_path: Path) -> None:
    raw = read_pickle(golden_dir() / "fairseq_prefix.pt")
    raw["model"]["encoder.encoder_prompt_encoder.scale"] = torch.ones(1)
    torch.save(raw, tmp_path / "odd.pt")
    with pytest.raises(BackboneFileError, match="neither a table"):
        convert(tmp_path / "odd.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_transformers_directory_converts(tmp_path: Path) -> None:
    report = convert(golden_dir() / "hf", tmp_path / "out")
    assert load_backbone(tmp_path / "out").fingerprint == report.fingerprint
    assert "decoder.output_projection.weight" in report.dropped


def test_renames_are_anchored() -> None:
    assert from_transformers("decoder.layers.0.cross_attn_mid_layer_norm.bias") == "decoder.layers.0.cross_attn_ln.bias"
    assert from_transformers("decoder.layers.0.cross_attn.c_attn") == "decoder.layers.0.encoder_attn.c_attn"
    assert from_transformers("encoder.layers.10.self_attn_mid_layer_norm.weight") == "encoder.layers.10.attn_ln.weight"
    assert (
        from_transformers("encoder.layers.1.self_attn_layer_norm.bias") == "encoder.layers.1.self_attn_layer_norm.bias"
    )


class Malice:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("place", ["fairseq", "transformers"])
def test_a_pickle_that_calls_a_function_is_refused_and_nothing_runs(tmp_path: Path, place: str) -> None:
    canary = tmp_path / "canary"
    source = tmp_path / "evil.pt"
    if place == "transformers":
        source = tmp_path / "evil"
        source.mkdir()
        shutil.copyfile(golden_dir() / "hf" / "config.json", source / "config.json")
    torch.save(
        {"model": {"x": torch.zeros(1)}, "cfg": Malice(canary)},
        source if place == "fairseq" else source / "pytorch_model.bin",
    )
    with pytest.raises(UnsafePickle, match="nothing of it was run"):
        convert(source, tmp_path / "out")
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_the_same_pickle_would_have_run(tmp_path: Path) -> None:
    """The control of the test above: the payload works where pickles are trusted."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Malice(canary)))
    assert canary.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"\x80\x04N.", b"<html>", os.urandom(200)],
    ids=["empty", "zip", "none", "html", "noise"],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(BackboneFileError):
        load_backbone(path)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    data = (golden_dir() / "fairseq_prefix.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(BackboneFileError):
        load_backbone(tmp_path / "cut.pt")


def test_absence_is_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(BackboneNotFound):
        load_backbone(tmp_path / "nothing")


PARAMETERS = {"tiny": 33_488_336, "medium": 92_892_000, "base": 182_238_536, "large": 472_977_152, "huge": 929_486_848}


@pytest.mark.parametrize(("size", "count"), PARAMETERS.items())
def test_the_released_sizes_have_the_released_number_of_parameters(size: str, count: int) -> None:
    config = OFA_SIZES[size]
    parameters = sum(s.numel() for n, s in expected_shapes(config).items() if "running_" not in n)
    grid = config.image_bucket_size
    image_tables = config.decoder_layers * ((2 * grid - 1) ** 2 + 3) * config.heads
    dropped = 4 * config.d_model + (grid**2 + 1) * config.d_model + image_tables
    assert parameters + dropped == count


@pytest.mark.parametrize("text", ["[]", "{", '{"name": "x"}', '{"surprise": 1}'])
def test_a_configuration_is_read_strictly(text: str) -> None:
    with pytest.raises(ConfigError):
        BackboneConfig.from_json(text)


def test_folding_changes_no_feature() -> None:
    unfolded = VisionStem(tiny.config(), folded=False).eval()
    state = {
        name: torch.rand_like(value) + 0.5 if value.is_floating_point() else value
        for name, value in unfolded.state_dict().items()
    }
    unfolded.load_state_dict(state)
    prefix = "encoder.embed_images."
    folded = VisionStem(tiny.config()).eval()
    named = fold_batch_norm({prefix + name: value for name, value in state.items() if "num_batches" not in name})
    folded.load_state_dict({name.removeprefix(prefix): value for name, value in named.items()})
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = unfolded(pixels)
        torch.testing.assert_close(folded(pixels), expected, atol=float(expected.abs().max()) * 1e-5, rtol=0)
