"""Prompt files read without a backbone, described in norms, and compared by their average keys and values."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from promptmux_prompts import InvalidPromptFile, Prompt, PromptNonfinite, PromptShapeMismatch, Refusal, write_prompt
from promptmux_prompts.describe import describe
from promptmux_prompts.format import Manifest
from promptmux_prompts.similarity import nearest, similarity
from promptmux_prompts.unfitted import MAX_FILE_BYTES, load_unfitted, scan_unfitted


def rebuilt(prompt: Prompt, manifest: Manifest | None = None, *, order: torch.Tensor | None = None) -> Prompt:
    """The prompt under another manifest, or with its positions in another order."""
    tensors = [prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value]
    if order is not None:
        tensors = [tensor[:, :, order] for tensor in tensors]
    return Prompt.build(manifest or prompt.manifest, *tensors)


def named(prompt: Prompt, name: str) -> Prompt:
    return rebuilt(prompt, replace(prompt.manifest, name=name))


@pytest.mark.parametrize(("encoder", "decoder"), [(4, 3), (4, 0), (0, 3), (0, 0)])
def test_a_file_is_read_without_knowing_its_backbone(encoder: int, decoder: int, tmp_path: Path) -> None:
    prompt = tiny.prompt(encoder_length=encoder, decoder_length=decoder)
    (path,) = tiny.write(tmp_path, prompt).iterdir()
    again = load_unfitted(path)
    assert again.digest == prompt.digest
    assert again.tensors.keys() == prompt.tensors.keys()


def test_numbers_stay_in_the_type_of_the_file(tmp_path: Path) -> None:
    prompt = tiny.prompt()
    halves = [t.half() for t in (prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value)]
    (path,) = tiny.write(tmp_path, Prompt.build(prompt.manifest, *halves)).iterdir()
    assert load_unfitted(path).encoder_key.dtype == torch.float16
    assert describe(load_unfitted(path)).dtype == "F16"


def test_all_but_the_fit_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data, error in (
        (write_prompt(tiny.prompt())[:-1], InvalidPromptFile),
        (write_prompt(tiny.prompt(scale=float("nan"))), PromptNonfinite),
        (
            write_prompt(tiny.prompt()).replace(b'\\"encoder_length\\":4', b'\\"encoder_length\\":5'),
            PromptShapeMismatch,
        ),
    ):
        path.write_bytes(data)
        with pytest.raises(error):
            load_unfitted(path)
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(InvalidPromptFile, match="at most"):
        load_unfitted(path)


def test_a_directory_gives_the_good_and_names_the_bad(tmp_path: Path) -> None:
    tiny.write(tmp_path, tiny.prompt("good"))
    (tmp_path / "broken.safetensors").write_bytes(b"no prompt")
    broken, good = scan_unfitted(tmp_path)
    assert isinstance(broken, Refusal)
    assert broken.name == "broken"
    assert isinstance(good, Prompt)


def test_a_description_has_shapes_bytes_and_the_mean_norm_of_each_layer() -> None:
    prompt = tiny.prompt(decoder_length=0)
    description = describe(prompt)
    assert (description.sha256, description.dtype, description.decoder) == (prompt.digest, "F32", None)
    assert description.encoder is not None
    assert description.encoder.shape == (2, 2, 4, 32)
    assert description.encoder.bytes == 2 * 2 * 2 * 4 * 32 * 4
    for norms, tensor in (
        (description.encoder.key_norms, prompt.encoder_key),
        (description.encoder.value_norms, prompt.encoder_value),
    ):
        expected = [
            sum(float(layer[head, p].square().sum()) ** 0.5 for head in range(2) for p in range(4)) / 8
            for layer in tensor
        ]
        assert norms == pytest.approx(expected, rel=1e-5)


def test_similarity_is_the_cosine_of_averages_over_positions() -> None:
    a, b = tiny.prompt(seed=1), tiny.prompt(seed=2, encoder_length=7, decoder_length=2)

    def means(p: Prompt) -> torch.Tensor:
        parts = (p.encoder_key, p.encoder_value, p.decoder_key, p.decoder_value)
        return torch.cat([part.mean(dim=2).flatten() for part in parts])

    expected = torch.cosine_similarity(means(a), means(b), dim=0)
    assert similarity(a, b) == similarity(b, a) == pytest.approx(float(expected), abs=1e-6)


def test_a_shuffled_copy_is_the_same_and_a_scaled_one_too() -> None:
    prompt = tiny.prompt(encoder_length=5, decoder_length=5)
    assert similarity(prompt, rebuilt(prompt, order=torch.tensor([3, 1, 4, 0, 2]))) == pytest.approx(1)
    assert similarity(prompt, tiny.prompt(encoder_length=5, decoder_length=5, scale=0.5)) == pytest.approx(1)
    assert similarity(prompt, tiny.prompt(encoder_length=5, decoder_length=5, scale=-1)) == pytest.approx(-1)


def test_a_missing_side_counts_against_likeness() -> None:
    """Half of the numbers agree, the others stand against nothing."""
    both = tiny.prompt()
    manifest = replace(both.manifest, decoder_length=0)
    nothing = both.decoder_key[:, :, :0]
    half = Prompt.build(manifest, both.encoder_key, both.encoder_value, nothing, nothing)
    found = similarity(both, half)
    assert found is not None
    assert 0.3 < found < 0.9


@pytest.mark.parametrize(
    "other",
    [tiny.prompt(seed=1, fingerprint="another"), tiny.prompt(seed=1, encoder_length=0), tiny.prompt(scale=0)],
    ids=["another backbone", "no side in common", "nothing but zeros"],
)
def test_what_cannot_be_compared_has_no_cosine(other: Prompt) -> None:
    assert similarity(tiny.prompt(decoder_length=0), other) is None


def test_the_nearest_come_first_and_the_prompt_itself_is_left_out() -> None:
    prompt = tiny.prompt()
    others = [
        tiny.prompt("stranger", seed=4),
        named(prompt, "copy"),
        prompt,
        tiny.prompt("foreign", fingerprint="another"),
        tiny.prompt("opposite", scale=-1),
    ]
    found = nearest(prompt, iter(others), k=2)
    assert [neighbour.name for neighbour in found.neighbours] == ["copy", "stranger"]
    assert found.neighbours[0].cosine == pytest.approx(1)
    assert (found.compared, found.incomparable) == (3, 1)


def one_at_a_time(count: int) -> Iterator[Prompt]:
    """Prompts; asserts that all but the latest are gone whenever the next one is asked for."""
    given: list[weakref.ref[Prompt]] = []
    for seed in range(count):
        assert [reference for reference in given[:-1] if reference() is not None] == []
        other = tiny.prompt(f"p{seed}", seed=seed + 1)
        given.append(weakref.ref(other))
        yield other


def test_others_are_held_one_at_a_time() -> None:
    assert nearest(tiny.prompt(), one_at_a_time(20)).compared == 20


def test_whoever_holds_them_all_is_seen() -> None:
    with pytest.raises(AssertionError):
        list(one_at_a_time(20))
