"""A run that stops after any step and goes on from its state ends with the same bits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from promptmux_server.training.cohort import Cohort
from promptmux_server.training.run import Run, RunState
from tuning_cases import tuning_run

EVERYTHING: dict[str, Any] = {
    "steps": 10,
    "backbone_dropout": 0.1,
    "accumulation": 2,
    "drop_worst": 0.2,
    "average_decay": 0.9,
}


def advanced(run: Run, advances: int) -> Run:
    cohort = Cohort()
    cohort.join(run)
    for _ in range(advances):
        cohort.advance()
    return run


def through_files(state: RunState) -> RunState:
    """What a checkpoint does to a state: safetensors and JSON."""
    return RunState(load(save(state.tensors)), json.loads(json.dumps(state.numbers)))


@pytest.mark.parametrize("index", [0, 2], ids=["table", "mlp"])
@pytest.mark.parametrize("advances", [0, 8, 11], ids=["at-the-start", "between-steps", "within-a-step"])
def test_ten_steps_are_four_and_six(index: int, advances: int) -> None:
    whole = advanced(tuning_run(index, **EVERYTHING), 20)
    state = through_files(advanced(tuning_run(index, **EVERYTHING), advances).state())
    resumed = tuning_run(index, **EVERYTHING)
    resumed.restore(state)
    assert resumed.step == advances // 2
    advanced(resumed, 20 - 2 * resumed.step)
    assert resumed.finished
    found, expected = resumed.state(), whole.state()
    assert found.numbers == expected.numbers
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in found.tensors.items())
    assert all(torch.equal(tensor, whole.saved()[name]) for name, tensor in resumed.saved().items())


@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq", "step", "average", "cursor"])
def test_a_state_without_one_of_its_parts_would_not_do(lost: str) -> None:
    whole = advanced(tuning_run(0, **EVERYTHING), 20)
    state = advanced(tuning_run(0, **EVERYTHING), 8).state()
    tensors = {name: torch.zeros_like(t) if name.startswith(f"{lost}/") else t for name, t in state.tensors.items()}
    numbers = state.numbers | ({"cursor": None} if lost == "cursor" else {})
    resumed = tuning_run(0, **EVERYTHING)
    resumed.restore(RunState(tensors, numbers))
    advanced(resumed, 12)
    assert any(not torch.equal(tensor, whole.saved()[name]) for name, tensor in resumed.saved().items())


def test_a_state_is_a_copy() -> None:
    run = advanced(tuning_run(0), 2)
    state = run.state()
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    advanced(run, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors.items())


def test_the_saved_values_are_the_average_where_there_is_one() -> None:
    run = advanced(tuning_run(0, average_decay=0.5), 1)
    name, parameter = next(iter(run.method.parameters.items()))
    initial = tuning_run(0).method.parameters[name]
    torch.testing.assert_close(run.values()[name], (0.5 * initial + 0.5 * parameter).detach())
