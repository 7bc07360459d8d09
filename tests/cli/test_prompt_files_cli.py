"""`promptmux prompts import` and `inspect`, run in this process on files of the released trainer and of PEFT's form."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from typer.testing import CliRunner, Result

import tiny
from cli.scripted_server import scripted_server
from promptmux_prompts import Kind, load_prompt, write_prompt
from promptmux_prompts.unfitted import load_unfitted
from promptmux_server.backbone.weights import LoadedBackbone, convert, load_backbone
from promptmux_server.cli import app, prompt_files
from promptmux_server.pocket import LIBRARY, WEIGHTS
from promptmux_server.pocket.recipes import POCKET_TASKS
from shared_files import golden_dir


def prompts(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prompts", *map(str, arguments)])


def report(*arguments: object) -> dict[str, Any]:
    done = prompts(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def refused(*arguments: object) -> str:
    done = prompts(*arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    """A prompt-tuned fairseq checkpoint."""
    return golden_dir() / "fairseq_prefix.pt"


@pytest.fixture(scope="module")
def backbone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's own backbone as a directory."""
    place = tmp_path_factory.mktemp("backbone") / "plain"
    convert(checkpoint, place)
    return place


def changed(backbone: Path, tensor: str, place: Path) -> Path:
    """A copy of the backbone in which one tensor is another."""
    place.mkdir()
    for file in backbone.glob("*.json"):
        (place / file.name).write_bytes(file.read_bytes())
    tensors = load_file(backbone / "model.safetensors")
    tensors[tensor] = tensors[tensor] + 0.25
    save_file(tensors, place / "model.safetensors")
    return place


def served(path: Path, backbone: LoadedBackbone) -> None:
    """Read as a server of this backbone reads it."""
    load_prompt(path, shape=backbone.prompt_shape, fingerprint=backbone.fingerprint, dtype=torch.bfloat16)


def test_the_kinds_offered_are_the_kinds_there_are() -> None:
    assert get_args(prompt_files.Kind) == get_args(Kind)


@pytest.mark.parametrize("command", ["import", "inspect"])
def test_each_command_shows_an_example(command: str) -> None:
    assert f"promptmux prompts {command}" in prompts(command, "--help").stdout.replace("\n", " ")


def test_a_checkpoint_becomes_a_file_that_a_server_takes(checkpoint: Path, tmp_path: Path) -> None:
    made = report(
        "import", checkpoint, "--out", tmp_path / "new", "--name", "vqa", "--kind", "answer", "--instruction",
        " what is {text}?", "--image-size", 64,
    )  # fmt: skip
    path = tmp_path / "new" / "vqa.safetensors"
    assert made["file"] == str(path)
    assert made["source"] == {"format": "fairseq", "encoder": "table", "decoder": "table"}
    served(path, load_backbone(checkpoint))
    manifest = load_unfitted(path).manifest
    assert manifest.image is not None
    assert (manifest.kind, manifest.instruction, manifest.image.size) == ("answer", " what is {text}?", 64)
    assert (manifest.encoder_length, manifest.decoder_length) == (5, 7)


def test_a_manifest_file_gives_the_other_keys_and_options_win(checkpoint: Path, tmp_path: Path) -> None:
    keys = {"kind": "label", "answers": ["yes", "no"], "labels": {"yes": "true", "no": "false"}, "name": "unused"}
    found = {"fingerprint": "f", "encoder_length": 99, "encoder_layers": [0, 1]}
    (tmp_path / "keys.json").write_text(json.dumps(keys | found))
    report("import", checkpoint, "--out", tmp_path, "--name", "entails", "--manifest", tmp_path / "keys.json")
    served(tmp_path / "entails.safetensors", load_backbone(checkpoint))
    manifest = load_unfitted(tmp_path / "entails.safetensors").manifest
    assert (manifest.labels, manifest.encoder_layers) == (keys["labels"], None)


def test_the_backbone_given_may_differ_in_drifted_statistics_only(
    checkpoint: Path, backbone: Path, tmp_path: Path
) -> None:
    same = report("import", checkpoint, "--out", tmp_path, "--name", "same", "--backbone", backbone)
    assert same["notes"] == []
    drifted = changed(backbone, "encoder.embed_images.bn1.running_mean", tmp_path / "drifted")
    made = report("import", checkpoint, "--out", tmp_path, "--name", "moved", "--backbone", drifted)
    assert "drifted" in made["notes"][0]
    served(tmp_path / "moved.safetensors", load_backbone(drifted))
    other = changed(backbone, "encoder.pos_ln.bias", tmp_path / "other")
    said = refused("import", checkpoint, "--out", tmp_path, "--name", "no", "--backbone", other)
    assert "encoder.pos_ln.bias" in said
    assert not (tmp_path / "no.safetensors").exists()


def peft_directory(place: Path, **config: object) -> Path:
    """A prefix that fits the embedded backbone: 4 layers of 3 heads of 64."""
    place.mkdir()
    described = {
        "peft_type": "PREFIX_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2, "num_layers": 4,
        "num_attention_heads": 3, "token_dim": 192, "num_virtual_tokens": 6, "base_model_name_or_path": "me/pocket",
    }  # fmt: skip
    (place / "adapter_config.json").write_text(json.dumps(described | config))
    table = torch.randn(6, 8 * 192, generator=torch.Generator().manual_seed(1))
    (place / "adapter_model.safetensors").write_bytes(save({"prompt_embeddings": table}))
    return place


def test_a_peft_directory_becomes_a_file_that_a_server_takes(tmp_path: Path) -> None:
    source = peft_directory(tmp_path / "prefix")
    made = report("import", source, "--out", tmp_path, "--backbone", "pocket")
    assert (made["name"], made["encoder_length"], made["decoder_length"]) == ("prefix", 0, 6)
    assert made["source"]["layout"] == "seq2seq"
    served(tmp_path / "prefix.safetensors", load_backbone(WEIGHTS))


def test_a_peft_directory_needs_a_backbone_and_the_right_one(tmp_path: Path) -> None:
    source = peft_directory(tmp_path / "prefix", base_model_name_or_path="me/other")
    assert "--backbone" in refused("import", source, "--out", tmp_path)
    assert "--same-backbone" in refused("import", source, "--out", tmp_path, "--backbone", "pocket")
    assert report("import", source, "--out", tmp_path, "--backbone", "pocket", "--same-backbone")


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    source = peft_directory(tmp_path / "prefix")
    (tmp_path / "prefix.safetensors").write_text("mine")
    assert "left alone" in refused("import", source, "--out", tmp_path, "--backbone", "pocket")
    assert (tmp_path / "prefix.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--name", "../x"], "name must match"),
        (["--kind", "box"], "needs a picture"),
        (["--kind", "label"], "needs answers and labels"),
        (["--image-size", "4000"], "too large for this backbone"),
        (["--backbone", "/nowhere"], "no backbone"),
        (["--side", "encoder"], "never gives"),
    ],
)
def test_a_mistake_in_an_option_is_explained(options: list[str], said: str, tmp_path: Path) -> None:
    source = peft_directory(tmp_path / "prefix")
    assert said in refused("import", source, "--out", tmp_path, "--backbone", "pocket", *options)


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"kind": NaN}', "not strict JSON"), ("[]", "JSON object"), ('{"surprise": 1}', "unknown keys: surprise")],
)
def test_a_mistake_in_the_manifest_file_is_explained(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(content)
    source = peft_directory(tmp_path / "prefix")
    keys = tmp_path / "keys.json"
    assert said in refused("import", source, "--out", tmp_path, "--backbone", "pocket", "--manifest", keys)


def test_what_is_no_source_is_explained(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "adapter_config.json" in refused("import", tmp_path / "empty", "--backbone", "pocket")
    assert "prompt file already" in refused("import", LIBRARY / "scene-vqa.safetensors")
    (tmp_path / "noise.pt").write_bytes(b"\x80\x04N.")
    assert "not a readable torch file" in refused("import", tmp_path / "noise.pt")


def test_inspect_shows_manifest_shapes_norms_and_the_nearest() -> None:
    file = LIBRARY / "scene-vqa.safetensors"
    shown = prompts("inspect", file, "--against", LIBRARY).stdout
    for expected in ("answer", "128: yes, no", "32 positions in 4 layers of 3 heads of 64", "nearest of 7"):
        assert expected in shown
    found = report("inspect", file, "--against", LIBRARY)
    assert found["sha256"] == load_unfitted(file).digest
    assert found["manifest"]["kind"] == "answer"
    assert found["encoder"]["shape"] == [4, 3, 32, 64]
    assert len(found["decoder"]["value_norms"]) == 4
    assert {neighbour["name"] for neighbour in found["nearest"]} <= set(POCKET_TASKS) - {"scene-vqa"}
    assert len(found["nearest"]) == 3
    assert "nearest" not in report("inspect", file)


def test_inspect_shows_which_layers_carry_a_prompt(tmp_path: Path) -> None:
    tiny.write(tmp_path, tiny.prompt("top", encoder_layers=(1, 2), decoder_layers=(0, 2)))
    shown = prompts("inspect", tmp_path / "top.safetensors").stdout
    assert "4 positions in layers 1 to 1 of 2 layers of 2 heads of 32" in shown
    assert "3 positions in layers 0 to 1 of 3 layers" in shown
    norms = [re.split(r" {2,}", line.strip()) for line in shown.splitlines() if re.match(r"\s*[012]  ", line)]
    assert [len(cells) for cells in norms] == [3, 5, 1]  # the layer's number, then what carries a prompt
    assert "0.000" not in shown


VERSION = {
    "name": "vqa", "version": 7, "sha256": "ab" * 32, "file_sha256": "cd" * 32, "bytes": 9, "encoder_length": 4,
    "decoder_length": 3, "created": "2026-01-02T03:04:05Z", "author": "somebody",
}  # fmt: skip


def test_an_import_may_be_pushed_and_then_leaves_no_file_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = peft_directory(tmp_path / "prefix")
    with scripted_server() as server:
        server.answers["PUT /v1/prompts/prefix"] = (201, VERSION | {"name": "prefix"})
        options = ("import", source, "--backbone", "pocket", "--push", "--url", server.address)
        made = report(*options)
        assert (made["pushed"], "file" in made) == ("prefix@7", False)
        assert list(tmp_path.iterdir()) == [source]
        assert report(*options, "--out", tmp_path)["file"] == str(tmp_path / "prefix.safetensors")
        sent = [body for _, body, _ in server.asked]
        assert sent == [(tmp_path / "prefix.safetensors").read_bytes()] * 2
        server.refuse("PUT /v1/prompts/prefix", 422, "prompt_shape_mismatch")
        assert "No." in refused(*options)


def test_inspect_compares_with_the_prompts_of_a_server(tmp_path: Path) -> None:
    (file,) = tiny.write(tmp_path, tiny.prompt("own")).iterdir()
    like = write_prompt(tiny.prompt("like", decoder_length=2))
    with scripted_server() as server:
        served = [VERSION | {"name": name} for name in ("bad", "gone", "like")]
        server.answers["GET /v1/prompts?limit=500"] = (200, {"prompts": served, "next": None})
        for name, data in (("bad", b"no prompt"), ("like", like)):
            headers = {"X-Content-SHA256": hashlib.sha256(data).hexdigest()}
            server.answers[f"GET /v1/prompts/{name}/versions/7/file"] = (200, (data, headers))
        found = report("inspect", file, "--against", server.address)
    assert [neighbour["name"] for neighbour in found["nearest"]] == ["like"]
    assert (found["compared"], found["unreadable"]) == (1, ["bad"])


def test_a_place_to_compare_with_that_is_neither_directory_nor_server_is_explained() -> None:
    said = refused("inspect", LIBRARY / "scene-vqa.safetensors", "--against", "/nowhere")
    assert "a directory of prompt files, or a server's address" in said


def test_inspect_says_what_it_did_not_compare(tmp_path: Path) -> None:
    tiny.write(tmp_path, tiny.prompt("own", decoder_length=0), tiny.prompt("foreign", fingerprint="another"))
    (tmp_path / "broken.safetensors").write_bytes(b"no prompt")
    arguments = ("inspect", tmp_path / "own.safetensors", "--against", tmp_path)
    shown = prompts(*arguments).stdout
    assert "not compared: 1" in shown
    assert "not readable: broken" in shown
    found = report(*arguments)
    assert (found["compared"], found["incomparable"], found["unreadable"]) == (0, 1, ["broken"])
    assert found["decoder"] is None


def test_a_file_that_no_server_would_take_is_refused_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no prompt")
    assert "(invalid_prompt_file)" in refused("inspect", tmp_path / "x.safetensors")
