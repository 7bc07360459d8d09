"""A training configuration is followed exactly or refused with the line, the field and what is allowed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.job_config import JobConfig, parse_job, read_job

GOOD = """\
output = "runs/pets"

[task]
name = "pets"
kind = "answer"

[data]
heldout = 0.2

[[data.train]]
path = "pets.jsonl"
images = "pictures"

[prompt]
encoder_length = 16

[steps]
steps = 500
learning_rate = 0.05
"""


def parsed(text: str, folder: str = "/data") -> JobConfig:
    return parse_job(text, "pets.toml", Path(folder))


def test_relative_paths_start_at_the_files_own_folder() -> None:
    config = parsed(GOOD)
    assert config.output == Path("/data/runs/pets")
    assert config.cache_folder == Path("/data/runs/pets/cache")
    assert config.data.train[0].path == Path("/data/pets.jsonl")
    assert config.data.train[0].images == Path("/data/pictures")
    assert config.backbone == "pocket"
    assert parsed(GOOD.replace("runs/pets", "/elsewhere")).output == Path("/elsewhere")
    assert parsed('backbone = "ofa"\n' + GOOD).backbone == "/data/ofa"


def test_what_is_not_said_has_its_default() -> None:
    config = parsed(GOOD)
    assert (config.prompt.encoder_length, config.prompt.decoder_length) == (16, 64)
    assert config.validate_every == 50
    assert config.publish.margin == 0.0


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("encoder_length", "encoder_lenght", "pets.toml, line 15: prompt.encoder_lenght: there is no such field here; "
         "did you mean `encoder_length`?"),
        ("heldout", "held", "Allowed are train, weights, validation, heldout, skip_bad, seed"),
        ("images", "pictures", "pets.toml, line 12: data.train.pictures: there is no such field here"),
        ("output", "outputs", "pets.toml, line 1: outputs: there is no such field"),
        ('kind = "answer"', 'kind = "essay"', "line 5: task.kind: input should be 'caption', 'answer'"),
        ('kind = "answer"\n', "", "pets.toml, line 3: task.kind: is missing"),
        ("steps = 500", 'steps = "500"', "line 18: steps.steps: input should be a valid integer"),
        ("learning_rate = 0.05", "learning_rate = -1", "line 17: steps: learning_rate must be above 0"),
        ("learning_rate = 0.05", "learning_rate = nan", "no setting is a date, a time, inf or nan"),
        ("learning_rate = 0.05", "learning_rate = 2026-01-01", "no setting is a date"),
        ("[steps]", '[method]\nname = "lora"\n[steps]', "line 18: method.name: input should be 'prompt', 'bitfit'"),
        ("[steps]", "[method]\nwidth = 8\n[steps]", "line 18: method.width: is of adapters alone"),
        ("[steps]", '[method]\nname = "bitfit"\n[steps]', "line 14: prompt: has no meaning for bitfit"),
        ("[prompt]\nencoder_length = 16\n\n[steps]\nsteps = 500\nlearning_rate = 0.05",
         '[method]\nname = "finetune"\n\n[steps]\nsteps = 500',
         "line 17: steps.learning_rate: is missing: the default is for prompts; the released scripts take 1e-5"),
        ("[prompt]\nencoder_length = 16", '[method]\nname = "adapter"\n[machine]\ndtype = "bfloat16"',
         "line 17: machine.dtype: adapter trains weights in float32"),
        ("[steps]", '[run]\nmetric = "cider"\n[steps]', "line 18: run.metric: only captions have a choice"),
        ("steps = 500", "steps = 1" + "0" * 5000, "no setting is a date"),
        ("steps = 500", "steps = " + "[" * 9999, "no setting is nested so deeply"),
        ("[steps]", "[steps]\n" + "a." * 30_000 + "a = 1", "no setting has a name of so many parts"),
        ("encoder_length = 16", "encoder_layers = [0]", "line 14: prompt: encoder_layers must be two numbers"),
        ("encoder_length = 16", "encoder_layers = 2", "line 15: prompt.encoder_layers: input should be a valid"),
        ("encoder_length = 16", "encoder_layers = [2, 2]", "encoder_layers must be two numbers, the first layer"),
        ("encoder_length = 16", "encoder_length = 0\nencoder_layers = [0, 2]", "encoder_layers must be left out where"),
        ("learning_rate = 0.05", "learning_rate = ", "is not TOML: Invalid value (at line 19, column 17)"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_what_is_allowed(before: str, after: str, said: str) -> None:
    with pytest.raises(TrainingConfigError) as refused:
        parsed(GOOD.replace(before, after, 1))
    assert said in refused.value.message
    assert "/data" not in refused.value.message


def test_a_configuration_may_be_json() -> None:
    document = json.dumps(tomllib.loads(GOOD))
    assert parse_job(document, "pets.json", Path("/data")) == parsed(GOOD)
    with pytest.raises(TrainingConfigError, match=r"pets.json: data.held: there is no such field here"):
        parse_job(document.replace("heldout", "held"), "pets.json", Path("/data"))
    for text in ("{", '{"output": NaN}', "[1]", "[" * 9999):
        with pytest.raises(TrainingConfigError, match=r"pets\.json"):
            parse_job(text, "pets.json", Path("/data"))


def test_the_section_publish_asks_for_it() -> None:
    assert not parsed(GOOD).asks_to_be_published
    assert parsed(GOOD + "[publish]\n").asks_to_be_published


def begun(lines: str) -> JobConfig:
    return parsed(GOOD + "\n[begin]\n" + lines)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('text = " a"\nnearest = 2\namong = "p"', "line 21: begin: say only one of text, prompt and nearest"),
        ("nearest = 2", "line 21: begin: say where the prompts are: among must be a folder or a server's address"),
        ('prompt = "vqa"', "line 21: begin: say where the prompts are"),
        ('prompt = "vqa.safetensors"\namong = "p"', "line 21: begin: among goes with nearest"),
        ('among = "p"', "line 21: begin: among goes with nearest"),
        ("text = []", "line 21: begin: text must not be empty"),
        ('text = [" a", ""]', "line 21: begin: text must not be empty"),
        ("text = [1]", "line 22: begin.text: input should be a valid string"),
        ("text = 1", "line 22: begin.text: input should be"),
        ('nearest = 0\namong = "p"', "line 22: begin.nearest: input should be greater than or equal to 1"),
        ('texts = " a"', "line 22: begin.texts: there is no such field here; did you mean `text`?"),
    ],
)
def test_a_beginning_is_said_in_one_way(lines: str, said: str) -> None:
    with pytest.raises(TrainingConfigError) as refused:
        begun(lines)
    assert said in refused.value.message


def test_a_beginnings_places_start_at_the_files_folder_and_servers_are_left_alone() -> None:
    assert begun('text = " a"').begin.text == [" a"]
    assert begun('text = [" a", " b"]').begin.text == [" a", " b"]
    assert begun('prompt = "p/vqa.safetensors"').begin.prompt == "/data/p/vqa.safetensors"
    assert begun('prompt = "vqa"\namong = "p"').begin.prompt == "vqa"
    assert begun('nearest = 2\namong = "p"').begin.among == "/data/p"
    assert begun('nearest = 2\namong = "http://localhost:8000"').begin.among == "http://localhost:8000"


def test_a_beginning_is_the_same_wherever_its_files_lie() -> None:
    first, second = (parsed(GOOD + '\n[begin]\nprompt = "p/v.safetensors"', folder) for folder in ("/a", "/b"))
    assert first.begin.asked == second.begin.asked == [None, "v.safetensors", None]


def test_all_mistakes_are_said_at_once() -> None:
    with pytest.raises(TrainingConfigError) as refused:
        parsed(GOOD.replace("heldout", "held").replace("steps = 500", "steps = 0.5"))
    assert len(refused.value.message.splitlines()) == 2


@pytest.mark.parametrize("content", [None, b"\xff", b"#" * (1 << 20) + b"\n"], ids=["missing", "binary", "huge"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "job.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainingConfigError, match=r"job\.toml"):
        read_job(path)


def test_a_file_is_read_with_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(GOOD)
    config, data = read_job(tmp_path / "job.toml")
    assert data == GOOD.encode()
    assert config.output == tmp_path.resolve() / "runs/pets"
