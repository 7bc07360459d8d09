"""Prompt files: what is written is read back, and everything else is refused with its own error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import tiny
from promptmux_prompts import (
    InvalidPromptFile,
    Manifest,
    Prompt,
    PromptBackboneMismatch,
    PromptDigestMismatch,
    PromptFileError,
    PromptNonfinite,
    PromptShapeMismatch,
    Refusal,
    Seed,
    load_manifest,
    load_prompt,
    read_prompt,
    read_seeds,
    write_prompt,
)
from promptmux_prompts.importers.ofa import fold_generator, join_table, split_table

FINGERPRINT = tiny.backbone().fingerprint
SHIPPED = Path(__file__).parents[2] / "prompts" / "library"
DIGEST = "faec2ce71c2d488abb031a45eaf26e1ccd9709d84708ea867a4eba26a7bc38e6"


def read(data: bytes, *, dtype: torch.dtype = torch.float32, sha256: str | None = None) -> Prompt:
    return read_prompt(data, shape=tiny.shape(), fingerprint=FINGERPRINT, dtype=dtype, sha256=sha256)


GOOD = write_prompt(tiny.prompt())


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: object, body: bytes, *, raw: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if raw is None else raw
    return len(text).to_bytes(8, "little") + text + body


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    header, body = header_of(GOOD)
    change(header)
    return with_header(header, body)


def manifest_edited(**changes: object) -> bytes:
    def change(header: dict[str, Any]) -> None:
        manifest = json.loads(header["__metadata__"]["promptmux"])
        manifest.update(changes)
        header["__metadata__"]["promptmux"] = json.dumps(manifest)

    return edited(change)


def raw_manifest(text: str) -> bytes:
    return edited(lambda header: header["__metadata__"].update(promptmux=text))


def duplicate_key() -> bytes:
    header, body = header_of(GOOD)
    text = json.dumps(header)
    extra = '"encoder.prefix.key":' + json.dumps(header["encoder.prefix.key"]) + ","
    return with_header(None, body, raw=("{" + extra + text[1:]).encode())


HEADER, BODY = header_of(GOOD)
KEY = "encoder.prefix.key"

INVALID = {
    "empty": b"",
    "seven bytes": GOOD[:7],
    "length zero": bytes(8),
    "length beyond all": (1 << 63).to_bytes(8, "little") + GOOD[8:],
    "header over 64 KiB": with_header({"__metadata__": {"promptmux": "x" * 70_000}}, b""),
    "cut in the header": GOOD[:100],
    "cut in the tensors": GOOD[:-1],
    "trailing byte": GOOD + b"\0",
    "leading blank": with_header(None, BODY, raw=b" " + json.dumps(HEADER).encode()),
    "byte order mark": with_header(None, BODY, raw=b"\xef\xbb\xbf" + json.dumps(HEADER).encode()),
    "no json": with_header(None, BODY, raw=b"{not json}"),
    "no utf-8": with_header(None, BODY, raw=b'{"\xff": 1}'),
    "a list": with_header([1, 2], BODY),
    "deep": with_header(None, BODY, raw=b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "duplicate tensor": duplicate_key(),
    "unknown tensor": edited(lambda h: h.update({"../../etc/passwd": h[KEY]})),
    "no metadata": edited(lambda h: h.pop("__metadata__")),
    "second metadata key": edited(lambda h: h["__metadata__"].update(format="pt")),
    "metadata of another type": edited(lambda h: h["__metadata__"].update(promptmux=3)),
    "key without value": edited(lambda h: h.pop("encoder.prefix.value")),
    "extra field": edited(lambda h: h[KEY].update(surprise=1)),
    "missing field": edited(lambda h: h[KEY].pop("dtype")),
    "float64": edited(lambda h: h[KEY].update(dtype="F64")),
    "type is a list": edited(lambda h: h[KEY].update(dtype=["F32"])),
    "mixed types": edited(lambda h: h[KEY].update(dtype="F16", shape=[4, 2, 4, 32])),
    "rank three": edited(lambda h: h[KEY].update(shape=[4, 4, 64])),
    "negative shape": edited(lambda h: h[KEY].update(shape=[-2, -2, 4, 32])),
    "huge shape": edited(lambda h: h[KEY].update(shape=[0, 1 << 62, 1, 1])),
    "shape of booleans": edited(lambda h: h[KEY].update(shape=[True, 2, 4, 32])),
    "overlap": edited(lambda h: h[KEY].update(data_offsets=h["encoder.prefix.value"]["data_offsets"])),
    "hole": edited(lambda h: h[KEY].update(data_offsets=[o + 8 for o in h[KEY]["data_offsets"]])),
    "manifest not json": raw_manifest("{"),
    "manifest twice a key": raw_manifest('{"schema": 1, "schema": 1}'),
    "manifest with NaN": raw_manifest('{"schema": NaN}'),
    "manifest a list": raw_manifest("[]"),
    "manifest of another schema": manifest_edited(schema=2),
    "manifest with an unknown key": manifest_edited(surprise=1),
    "manifest without keys": raw_manifest('{"schema": 1}'),
    "name is a path": manifest_edited(name="../../etc/passwd"),
    "name with dots": manifest_edited(name="a..b"),
    "name too long": manifest_edited(name="a" * 65),
    "unknown kind": manifest_edited(kind="song"),
    "unknown placeholder": manifest_edited(instruction="{__class__}"),
    "label without answers": manifest_edited(kind="label"),
    "answers twice": manifest_edited(answers=["a", "a"]),
    "labels of other answers": manifest_edited(answers=["a"], labels={"b": "c"}),
    "image size as text": manifest_edited(image={"size": "64", "mean": 0.5, "std": 0.5}),
    "image std zero": manifest_edited(image={"size": 64, "mean": 0.5, "std": 0}),
    "length over 256": manifest_edited(encoder_length=257),
    "one layer bound": manifest_edited(encoder_layers=[1]),
    "layers of another type": manifest_edited(encoder_layers=[0, True]),
    "layers as text": manifest_edited(encoder_layers="12"),
    "layers from below": manifest_edited(encoder_layers=[-1, 1]),
    "no layer": manifest_edited(decoder_layers=[1, 1]),
    "layers of an absent side": manifest_edited(encoder_length=0, encoder_layers=[0, 1]),
    "numbers in layers without prompt": manifest_edited(encoder_layers=[0, 1]),
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "zip": b"PK\x03\x04" + bytes(100),
    "html": b"<!doctype html><html></html>",
}

EXCHANGED = {
    "encoder.prefix.key": "decoder.prefix.key",
    "encoder.prefix.value": "decoder.prefix.value",
    "decoder.prefix.key": "encoder.prefix.key",
    "decoder.prefix.value": "encoder.prefix.value",
}

OTHER = {
    "another length than the manifest says": (manifest_edited(encoder_length=5), PromptShapeMismatch),
    "encoder and decoder exchanged": (
        with_header(
            {EXCHANGED.get(name, name): entry for name, entry in HEADER.items()},
            BODY,
        ),
        PromptShapeMismatch,
    ),
    "transposed": (edited(lambda h: h[KEY].update(shape=[2, 4, 2, 32])), PromptShapeMismatch),
    "layers beyond the backbone's": (manifest_edited(encoder_layers=[0, 3]), PromptShapeMismatch),
    "another backbone": (manifest_edited(fingerprint="0" * 64), PromptBackboneMismatch),
    "NaN": (write_prompt(tiny.prompt(scale=float("nan"))), PromptNonfinite),
    "infinity": (write_prompt(tiny.prompt(scale=float("inf"))), PromptNonfinite),
    "absurdly large": (write_prompt(tiny.prompt(scale=1e6)), PromptNonfinite),
}


@pytest.mark.parametrize("data", INVALID.values(), ids=INVALID.keys())
def test_a_malformed_file_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidPromptFile):
        read(data)


@pytest.mark.parametrize(("data", "error"), OTHER.values(), ids=OTHER.keys())
def test_a_wrong_prompt_is_refused_with_its_own_error(data: bytes, error: type[PromptFileError]) -> None:
    with pytest.raises(error):
        read(data)


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [error.code for error in PromptFileError.__subclasses__()]
    assert len(set(codes)) == len(codes) == 5


def test_the_good_file_is_good() -> None:
    assert read(GOOD).manifest == tiny.prompt().manifest


def test_two_thousand_mutations_raise_documented_errors_only() -> None:
    rng = random.Random(20)
    survived = 0
    for _ in range(2000):
        data = bytearray(GOOD)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(min(len(data), 900) if rng.random() < 0.8 else len(data))
            choice = rng.randrange(3)
            if choice == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif choice == 1:
                del data[place : place + rng.randint(1, 9)]
            else:
                data[place:place] = rng.randbytes(rng.randint(1, 9))
        try:
            read(bytes(data))
            survived += 1
        except PromptFileError:
            pass
    assert survived < 600  # flips inside tensors and manifest texts may be harmless


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_survive_in_every_type(dtype: torch.dtype) -> None:
    prompt = tiny.prompt()
    stored = Prompt.build(
        prompt.manifest,
        *(t.to(dtype) for t in (prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value)),
    )
    again = read(write_prompt(stored), dtype=dtype)
    assert again.digest == stored.digest
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in stored.tensors.items())


def test_bytes_are_the_same_every_time() -> None:
    assert len({write_prompt(tiny.prompt()) for _ in range(20)}) == 1


def test_the_digest_is_of_the_content_not_of_the_serving_type() -> None:
    assert read(GOOD).digest == read(GOOD, dtype=torch.bfloat16).digest == tiny.prompt().digest
    assert tiny.prompt(seed=1).digest != tiny.prompt().digest
    assert tiny.prompt(instruction=" other {text}").digest != tiny.prompt().digest


def test_an_announced_digest_is_compared() -> None:
    assert read(GOOD, sha256=tiny.prompt().digest)
    with pytest.raises(PromptDigestMismatch):
        read(GOOD, sha256="0" * 64)


def test_finite_in_the_file_but_not_as_served_is_refused() -> None:
    prompt = tiny.prompt()
    prompt.encoder_key[0, 0, 0, 0] = 9e3  # within bounds
    assert read(write_prompt(prompt), dtype=torch.float16)
    prompt.encoder_key[0, 0, 0, 0] = 1e5  # infinite as float16
    with pytest.raises(PromptNonfinite):
        read(write_prompt(prompt), dtype=torch.float16)


@pytest.mark.parametrize(("encoder", "decoder"), [(0, 0), (5, 0), (0, 5)])
def test_an_absent_side_has_length_zero(encoder: int, decoder: int) -> None:
    again = read(write_prompt(tiny.prompt(encoder_length=encoder, decoder_length=decoder)))
    assert (again.encoder_key.shape[2], again.decoder_value.shape[2]) == (encoder, decoder)


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("layer", [0, 2], ids=["below", "above"])
def test_layers_without_prompt_hold_zeros_and_no_number_however_small(layer: int, part: str) -> None:
    prompt = tiny.prompt(decoder_layers=(1, 2))
    again = read(write_prompt(prompt), sha256=prompt.digest)
    assert again.manifest.decoder_layers == (1, 2)
    assert [bool(again.decoder_key[index].any()) for index in range(3)] == [False, True, False]
    getattr(prompt, f"decoder_{part}")[layer, 1, 2, 3] = 1e-30  # zero as float16
    with pytest.raises(InvalidPromptFile, match=rf"decoder.prefix.{part} must be zero .* decoder_layers, \[1, 2\]"):
        read(write_prompt(prompt), dtype=torch.float16)
    with pytest.raises(InvalidPromptFile, match="must be zero"):
        Prompt.build(
            prompt.manifest, prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value
        )


def test_layers_are_part_of_what_a_digest_is_of() -> None:
    digests = {tiny.prompt(scale=0.0, decoder_layers=layers).digest for layers in (None, (0, 2), (1, 3), (0, 3))}
    assert len(digests) == 4


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.safetensors")), ids=lambda path: path.stem)
def test_a_shipped_manifest_is_written_as_it_was_so_its_digest_stands(path: Path) -> None:
    header, _ = header_of(path.read_bytes())
    written = header["__metadata__"]["promptmux"]
    assert Manifest.from_json(written).to_json() == written
    assert "_layers" not in written


def test_a_digest_is_for_ever() -> None:
    """Of a file without layers; another one would make every published version another content."""
    manifest = Manifest.minimal(name="a", backbone_name="b", fingerprint="c", encoder_length=1, decoder_length=0)
    one, none = torch.ones(2, 1, 1, 4), torch.ones(2, 1, 0, 4)
    assert Prompt.build(manifest, one, one, none, none).digest == DIGEST


def test_too_large_a_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.truncate(tiny.shape().max_bytes + 1)
    with pytest.raises(InvalidPromptFile, match="at most"):
        load_prompt(path, shape=tiny.shape(), fingerprint=None, dtype=torch.float32)


def test_a_directory_serves_the_good_and_explains_the_bad(tmp_path: Path) -> None:
    tiny.write(tmp_path, tiny.prompt("good"), tiny.prompt("fine", seed=2))
    (tmp_path / "broken.safetensors").write_bytes(GOOD[:50])
    (tmp_path / "renamed.safetensors").write_bytes(GOOD)
    (tmp_path / "No Name.safetensors").write_bytes(GOOD)
    (tmp_path / "notes.txt").write_text("not a prompt")
    found = list(read_seeds(tmp_path, shape=tiny.shape(), fingerprint=FINGERPRINT, dtype=torch.float32))
    seeds = {entry.name: entry for entry in found if isinstance(entry, Seed)}
    assert list(seeds) == ["fine", "good", "renamed"]
    assert (seeds["renamed"].data, seeds["renamed"].prompt.digest) == (GOOD, tiny.prompt().digest)
    assert {entry.name: entry.code for entry in found if isinstance(entry, Refusal)} == {
        "broken": "invalid_prompt_file",
        "No Name": "invalid_prompt_file",
    }


def test_a_manifest_is_read_without_its_tensors_and_checked_as_with_them(tmp_path: Path) -> None:
    [path] = tiny.write(tmp_path, tiny.prompt()).glob("*.safetensors")
    assert load_manifest(path, shape=tiny.shape(), fingerprint=FINGERPRINT) == tiny.prompt().manifest
    with pytest.raises(PromptBackboneMismatch):
        load_manifest(path, shape=tiny.shape(), fingerprint="another")
    path.write_bytes(GOOD[:-1])
    with pytest.raises(InvalidPromptFile, match="fill the file"):
        load_manifest(path, shape=tiny.shape(), fingerprint=FINGERPRINT)


@pytest.mark.parametrize("value", ['{"x": "\\ud800"}', '{"x": ' + "[" * 40 + "]" * 40 + "}"], ids=["half", "deep"])
def test_a_manifest_that_no_encoder_could_write_back_is_refused(value: str) -> None:
    text = tiny.prompt().manifest.to_json().replace('"provenance":{}', f'"provenance":{value}')
    with pytest.raises(InvalidPromptFile, match="strict JSON"):
        Manifest.from_json(text)


def test_a_manifest_survives_its_json() -> None:
    manifest = replace(
        tiny.prompt().manifest,
        answers=("yes", "no"),
        metric={"name": "accuracy", "value": 0.5, "n": 9},
        encoder_layers=(0, 1),
    )
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_folded_generator_is_the_generator() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "embedding.weight": (6, 8),
        "trans.0.weight": (20, 8),
        "trans.0.bias": (20,),
        "trans.2.weight": (48, 20),
        "trans.2.bias": (48,),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    first, last = torch.nn.Linear(8, 20), torch.nn.Linear(20, 48)
    for layer, number in ((first, 0), (last, 2)):
        layer.weight.data, layer.bias.data = tensors[f"trans.{number}.weight"], tensors[f"trans.{number}.bias"]
    with torch.no_grad():
        expected = last(torch.relu(first(tensors["embedding.weight"])))
    torch.testing.assert_close(fold_generator(tensors), expected)


def test_tables_split_as_specified_and_join_again() -> None:
    layers, heads, dim, length = 3, 2, 5, 4
    table = torch.arange(length * layers * 2 * heads * dim, dtype=torch.float32).view(length, -1)
    key, value = split_table(table, layers, heads)
    for layer in range(layers):
        for head in range(heads):
            for position in range(length):
                row = table[position].view(layers, 2, heads, dim)[layer]
                assert torch.equal(key[layer, head, position], row[0, head])
                assert torch.equal(value[layer, head, position], row[1, head])
    assert torch.equal(join_table(key, value), table)


def test_a_file_written_by_the_library_alone_is_refused() -> None:
    with pytest.raises(InvalidPromptFile):
        read(save({"weight": torch.zeros(2, 2)}))
