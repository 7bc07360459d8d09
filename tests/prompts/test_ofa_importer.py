"""OFA's tables and generators become prompts; checkpoints without usable prompts are refused with the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tiny
from promptmux_prompts import PromptShapeMismatch, read_prompt, write_prompt
from promptmux_prompts.errors import ImportRefused
from promptmux_prompts.importers import import_ofa

SHAPE = tiny.shape()
WIDTH = {"encoder": 2 * SHAPE.encoder_layers * 64, "decoder": 2 * SHAPE.decoder_layers * 64}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def stem(side: str) -> str:
    return f"{side}.{side}_prompt_encoder."


def table(side: str, length: int = 5) -> dict[str, Tensor]:
    return {f"{stem(side)}embedding.weight": draw(length, WIDTH[side])}


def generator(side: str, length: int = 7) -> dict[str, Tensor]:
    return {
        f"{stem(side)}embedding.weight": draw(length, 64),
        f"{stem(side)}trans.0.weight": draw(24, 64) / 8,
        f"{stem(side)}trans.0.bias": draw(24),
        f"{stem(side)}trans.2.weight": draw(WIDTH[side], 24) / 8,
        f"{stem(side)}trans.2.bias": draw(WIDTH[side]),
    }


def generated(tensors: dict[str, Tensor], side: str) -> Tensor:
    """What torch's own layers make of a generator."""
    first, last = torch.nn.Linear(64, 24), torch.nn.Linear(24, WIDTH[side])
    network = torch.nn.Sequential(first, torch.nn.ReLU(), last)
    for name, layer in (("trans.0", first), ("trans.2", last)):
        layer.load_state_dict({part: tensors[f"{stem(side)}{name}.{part}"] for part in ("weight", "bias")})
    with torch.no_grad():
        output: Tensor = network(tensors[f"{stem(side)}embedding.weight"])
    return output


def row(key: Tensor, value: Tensor, position: int) -> Tensor:
    """Row of the table: layer by layer K then V, head by head (ofa-spec 4.2)."""
    parts = [side[layer, :, position].flatten() for layer in range(len(key)) for side in (key, value)]
    return torch.cat(parts)


def test_a_table_and_a_generator_become_the_two_sides_of_a_prompt() -> None:
    tensors = {**table("encoder"), **generator("decoder"), "encoder.pos_ln.bias": torch.zeros(64)}
    sides = import_ofa(tensors, SHAPE)
    assert torch.equal(row(*sides.encoder, 3), tensors[f"{stem('encoder')}embedding.weight"][3])
    torch.testing.assert_close(row(*sides.decoder, 6), generated(tensors, "decoder")[6])
    prompt = sides.prompt(replace(tiny.prompt().manifest, provenance={"seed": 1}))
    assert (prompt.manifest.encoder_length, prompt.manifest.decoder_length) == (5, 7)
    assert prompt.manifest.provenance == {
        "seed": 1,
        "source": {"format": "fairseq", "encoder": "table", "decoder": "generator"},
    }
    again = read_prompt(write_prompt(prompt), shape=SHAPE, fingerprint=None, dtype=torch.float32)
    assert again.digest == prompt.digest


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_one_side_alone_leaves_the_other_empty(side: str) -> None:
    prompt = import_ofa(table(side), SHAPE).prompt(tiny.prompt().manifest)
    assert prompt.encoder_key.shape == (2, 2, 5 if side == "encoder" else 0, 32)
    assert prompt.decoder_key.shape == (3, 2, 5 if side == "decoder" else 0, 32)


@pytest.mark.parametrize(
    ("encoder", "decoder", "kept"),
    [
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float64, torch.float64, torch.float32),
    ],
    ids=["halves stay halves", "two types widen", "doubles narrow"],
)
def test_numbers_keep_a_type_that_prompt_files_know(
    encoder: torch.dtype, decoder: torch.dtype, kept: torch.dtype
) -> None:
    tensors = {name: t.to(encoder) for name, t in table("encoder").items()}
    tensors |= {name: t.to(decoder) for name, t in table("decoder").items()}
    prompt = import_ofa(tensors, SHAPE).prompt(tiny.prompt().manifest)
    assert {tensor.dtype for tensor in prompt.tensors.values()} == {kept}


def test_a_checkpoint_without_prompts_says_what_it_is_good_for() -> None:
    with pytest.raises(ImportRefused, match="promptmux convert"):
        import_ofa({"encoder.pos_ln.bias": torch.zeros(64)}, SHAPE)


def without(tensors: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}


@pytest.mark.parametrize(
    "tensors",
    [
        without(generator("encoder"), "trans.2.bias"),
        without(table("encoder"), "embedding.weight") | {f"{stem('encoder')}lstm.weight": torch.zeros(2)},
        table("encoder") | {f"{stem('encoder')}scale": torch.ones(1)},
    ],
    ids=["half a generator", "no table", "a table and something else"],
)
def test_a_prompt_encoder_of_another_make_is_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ImportRefused, match="neither a table"):
        import_ofa(tensors, SHAPE)


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{stem('encoder')}embedding.weight": draw(5, WIDTH["decoder"])},
        table("decoder", length=257),
        table("decoder", length=0),
        {f"{stem('encoder')}embedding.weight": draw(WIDTH["encoder"])},
        generator("encoder") | {f"{stem('encoder')}trans.0.weight": draw(24, 63)},
    ],
    ids=["another depth", "too long", "empty", "no table of rows", "matrices that do not fit"],
)
def test_a_table_of_another_size_is_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(PromptShapeMismatch):
        import_ofa(tensors, SHAPE)
