"""A search's configuration is followed exactly or refused with the line, the field and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.job_config import BeginConfig
from promptmux_server.training.search.config import parse_search, trial_config
from promptmux_server.training.search.space import Choice, Range

GOOD = """\
output = "runs/pets"

[task]
name = "pets"
kind = "answer"

[[data.train]]
path = "pets.jsonl"

[begin]
text = " what is it?"

[steps]
steps = 90
warmup = 0.1

[search]
trials = 12

[search.space]
learning_rate = { low = 0.001, high = 0.1, log = true }
encoder_length = { low = 0, high = 64, step = 8 }
generator = ["table", "mlp"]
weight_decay = 0.02
decoder_layers = [[0, 2], [0, 4]]
begin = ["noise", "text"]
"""


def test_axes_are_ranges_lists_and_values() -> None:
    space = parse_search(GOOD, "s.toml", Path("/data")).search.space
    assert space == {
        "learning_rate": Range(0.001, 0.1, log=True),
        "encoder_length": Range(0, 64, step=8),
        "generator": Choice(("table", "mlp")),
        "weight_decay": Choice((0.02,)),
        "decoder_layers": Choice(("[0, 2]", "[0, 4]")),
        "begin": Choice(("noise", "text")),
    }
    assert [axis.whole for axis in space.values() if isinstance(axis, Range)] == [False, True]


def test_rungs_are_the_last_step_divided_unless_they_are_written() -> None:
    assert parse_search(GOOD, "s.toml", Path("/data")).rungs == (10, 30)
    assert parse_search(GOOD.replace("[search]", "[search]\nreduction = 2"), "s.toml", Path("/data")).rungs == (22, 45)
    assert parse_search(GOOD.replace("[search]", "[search]\nrungs = []"), "s.toml", Path("/data")).rungs == ()


def test_a_trial_is_a_job_with_its_values_and_the_files_elsewhere() -> None:
    search = parse_search(GOOD, "s.toml", Path("/data"))
    trial = trial_config(search, 7, {"learning_rate": 0.01, "encoder_length": 8, "begin": "noise"})
    assert (trial.steps.learning_rate, trial.steps.warmup, trial.steps.steps) == (0.01, 0.1, 90)
    assert (trial.prompt.encoder_length, trial.prompt.decoder_length) == (8, 64)
    assert trial.begin.text is None
    assert trial.prompt.decoder_layers is None
    assert trial_config(search, 7, {"decoder_layers": "[0, 4]"}).prompt.decoder_layers == (0, 4)
    assert trial_config(search, 7, {"begin": "text"}).begin.text == [" what is it?"]
    assert trial.output == Path("/data/runs/pets/trials/0007")
    assert trial.cache_folder == search.cache_folder


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("trials = 12", "trails = 12", "s.toml, line 18: search.trails: there is no such field here; did you mean "
         "`trials`? Allowed are space, trials"),
        ("trials = 12", "trials = 0", "line 18: search.trials: input should be greater than or equal to 1"),
        ("trials = 12", "rungs = [30, 10]", "line 18: search.rungs: rungs must ascend, and lie below steps.steps"),
        ("trials = 12", "rungs = [90]", "line 18: search.rungs: rungs must ascend"),
        ("learning_rate =", "learning_rates =", "line 21: search.space.learning_rates: there is no such field here; "
         "did you mean `learning_rate`?"),
        ("weight_decay = 0.02", "steps = [10, 20]", "All trials have the same steps, accumulation, seed"),
        ("low = 0.001", "low = 0.0", "line 21: search.space.learning_rate: with log, low must be above 0"),
        ("low = 0.001", "from = 0.001", "learning_rate: from: there is no such field here"),
        ("low = 0.001", "low = 0.2", "learning_rate: low must be below high"),
        ("low = 0.001", 'low = "0.001"', "learning_rate: low must be a number"),
        ("low = 0, high = 64", "low = -8, high = 64", "line 22: search.space.encoder_length: -8 is not allowed: "),
        ("low = 0, high = 64, step = 8", "low = 0.0, high = 64.5", "0.0 is not allowed: input should be a valid int"),
        ('"mlp"', '"cnn"', "line 23: search.space.generator: 'cnn' is not allowed: input should be 'table' or 'mlp'"),
        ("[0, 4]", "[4, 0]", "line 25: search.space.decoder_layers: '[4, 0]' is not allowed: decoder_layers must"),
        ("[0, 4]", "'[oops'", "line 25: search.space.decoder_layers: '[oops' is not allowed: input should be a valid"),
        ("[0, 4]", "4", "line 25: search.space.decoder_layers: 4 is not allowed: input should be a valid array"),
        ("[0, 4]", "[0, 2]", "line 25: search.space.decoder_layers: a list must hold different values"),
        ("weight_decay = 0.02", "weight_decay = []", "a list must hold different values"),
        ("weight_decay = 0.02", "weight_decay = [0.1, 0.1]", "a list must hold different values"),
        ('"noise", "text"', '"noise", "words"', "line 26: search.space.begin: a prompt may begin as noise, text"),
        ('text = " what is it?"', "", "line 26: search.space.begin: write begin.text too"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_what_is_allowed(before: str, after: str, said: str) -> None:
    assert before in GOOD
    with pytest.raises(TrainingConfigError) as refused:
        parse_search(GOOD.replace(before, after, 1), "s.toml", Path("/data"))
    assert said in refused.value.message


def test_a_trial_that_begins_as_noise_keeps_nothing_of_another_beginning() -> None:
    text = GOOD.replace('text = " what is it?"', 'nearest = 2\namong = "prompts"').replace('"text"]', '"nearest"]')
    search = parse_search(text, "s.toml", Path("/data"))
    assert trial_config(search, 0, {"begin": "noise"}).begin == BeginConfig()
    assert trial_config(search, 0, {"begin": "nearest"}).begin == BeginConfig(nearest=2, among="/data/prompts")


def test_only_prompts_are_searched() -> None:
    text = GOOD.replace('text = " what is it?"', "").replace("[begin]", '[method]\nname = "bitfit"')
    text = text.replace('begin = ["noise", "text"]', "").replace("steps = 90", "steps = 90\nlearning_rate = 1e-4")
    with pytest.raises(TrainingConfigError, match=r"line 11: method.name: only prompts are searched") as refused:
        parse_search(text, "s.toml", Path("/data"))
    assert refused.value.details["mistakes"][0]["field"] == "method.name"


def test_a_search_needs_something_to_search() -> None:
    empty = GOOD[: GOOD.index("learning_rate")]
    with pytest.raises(TrainingConfigError, match="name at least one field to search: begin, encoder_length"):
        parse_search(empty, "s.toml", Path("/data"))
