"""Runs that share a batch learn what each would learn alone, and what happens to one happens to no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from promptmux_server.errors import PromptmuxError, TrainingDiverged, TrainingError
from promptmux_server.training import run as run_module
from promptmux_server.training.batch import Cursor, TrainingBatch
from promptmux_server.training.chance import Chance
from promptmux_server.training.cohort import Cohort, train
from promptmux_server.training.loss import LossNumbers
from promptmux_server.training.passes import backward
from promptmux_server.training.recipe import PLAINLY, ComputeRecipe
from promptmux_server.training.run import Run
from tuning_cases import Curve, OneBatch, RandomBatches, advance_all, curves, difference, tuning_run

TOLERANCE = 1e-5
EVERYTHING: dict[str, object] = {
    "backbone_dropout": 0.1,
    "backbone_drop_path": 0.2,
    "accumulation": 2,
    "drop_worst": 0.2,
    "drop_worst_after": 2,
    "average_decay": 0.9,
}


def alone(index: int, **changes: object) -> Curve:
    run = tuning_run(index, **changes)
    return curves([run])[run.name]


def gradients(runs: list[Run]) -> list[dict[str, Tensor]]:
    """Of one batch each, computed in one pass."""
    backward([(run, run.take()) for run in runs], PLAINLY)
    return [{name: p.grad for name, p in run.method.parameters.items() if p.grad is not None} for run in runs]


def test_gradients_of_one_pass_are_those_of_separate_passes() -> None:
    together = gradients([tuning_run(i) for i in range(4)])
    for index, found in enumerate(together):
        (expected,) = gradients([tuning_run(index)])
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert float((gradient - expected[name]).abs().max()) <= TOLERANCE * float(expected[name].abs().max())


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything-on"])
def test_curves_of_one_batch_are_those_of_separate_runs(changes: dict[str, object]) -> None:
    found = curves([tuning_run(i, **changes) for i in range(4)])
    assert [len(found[f"run-{i}"]) for i in range(4)] == [6, 9, 8, 7]
    for index in range(4):
        assert difference(found[f"run-{index}"], alone(index, **changes)) <= TOLERANCE


def test_what_was_learned_is_the_same_too() -> None:
    together, separate = tuning_run(1), tuning_run(1)
    curves([tuning_run(0), together, tuning_run(3)])
    curves([separate])
    for name, value in together.saved().items():
        torch.testing.assert_close(value, separate.saved()[name], atol=1e-5, rtol=0)


def test_a_run_that_joins_late_and_one_that_is_pruned_change_nothing_for_the_others() -> None:
    cohort = Cohort()
    pruned: list[Run] = []

    def before(advance: int) -> None:
        if advance == 0:
            for index in range(3):
                cohort.join(tuning_run(index))
        if advance == 2:
            cohort.join(tuning_run(3))
        if advance == 4:
            pruned.append(cohort.leave("run-1"))

    found, _ = advance_all(cohort, before)
    for index in (0, 2, 3):
        assert difference(found[f"run-{index}"], alone(index)) <= TOLERANCE
    assert difference(found["run-1"], alone(1)[:4]) <= TOLERANCE
    rest = curves(pruned)["run-1"]
    assert difference(found["run-1"] + rest, alone(1)) <= TOLERANCE


def test_randomness_that_neighbours_share_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = torch.Generator().manual_seed(0)

    def kept(
        chance: Chance, row: int, shape: tuple[int, ...], dropped: float, place: str, device: torch.device
    ) -> Tensor:
        return torch.empty(tuple(shape), dtype=torch.uint8).bernoulli_(1.0 - dropped, generator=shared)

    monkeypatch.setattr(Chance, "kept", kept)
    found = curves([tuning_run(0), tuning_run(3)])
    shared.manual_seed(0)
    assert difference(found["run-3"], alone(3)) > 100 * TOLERANCE


def test_a_norm_that_neighbours_share_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    together = [tuning_run(0), tuning_run(1)]
    expected = alone(1)
    everyone = [p for run in together for p in run.method.parameters.values()]
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(run_module.nn.utils, "clip_grad_norm_", lambda _own, norm: clip(everyone, norm))
    assert difference(curves(together)["run-1"], expected) > 100 * TOLERANCE


def test_a_mean_over_the_tokens_of_all_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(1)
    absorb = Run.absorb
    monkeypatch.setattr(Run, "absorb", lambda run, loss: absorb(run, replace(loss, tokens=2 * loss.tokens)))
    assert difference(curves([tuning_run(0), tuning_run(1)])["run-1"], expected) > 100 * TOLERANCE


def test_with_a_pass_of_its_own_a_run_gets_the_same_bits_in_any_company() -> None:
    found = curves([tuning_run(i) for i in range(4)], ComputeRecipe(rows_per_pass=1))
    assert found == {f"run-{i}": alone(i) for i in range(4)}


def test_passes_hold_no_more_rows_than_may_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(sharing: list[tuple[Run, object]], compute: ComputeRecipe) -> list[LossNumbers]:
        sizes.append(sum(3 + int(run.name[-1]) for run, _ in sharing))
        return backward(sharing, compute)  # type: ignore[arg-type]

    monkeypatch.setattr("promptmux_server.training.cohort.backward", counted)
    cohort = Cohort(ComputeRecipe(rows_per_pass=8))
    for index in range(4):  # 3, 4, 5 and 6 rows
        cohort.join(tuning_run(index))
    cohort.advance()
    assert sizes == [7, 5, 6]


class Unfit:
    """Data whose third batch cannot be had: a picture that is no number, or an error."""

    def __init__(self, error: PromptmuxError | None) -> None:
        self._error, self._good = error, RandomBatches(1, rows=4)

    def take(self, cursor: Cursor) -> tuple[TrainingBatch, Cursor]:
        batch, ahead = self._good.take(cursor)
        if ahead != 3:
            return batch, ahead
        if self._error:
            raise self._error
        shown = [replace(e, image=0) for e in batch.examples]
        return TrainingBatch(shown, [torch.full((3, 32, 32), float("nan"))]), ahead


@pytest.mark.parametrize("error", [None, TrainingError("Line 7 is no picture.")], ids=["not-a-number", "bad-line"])
def test_a_run_that_fails_leaves_and_the_others_go_on(error: PromptmuxError | None) -> None:
    cohort, failing = Cohort(), tuning_run(1, data=Unfit(error))
    for run in (tuning_run(0), failing, tuning_run(2)):
        cohort.join(run)
    found, failures = advance_all(cohort)
    assert [failure.run.name for failure in failures] == ["run-1"]
    assert failures[0].error is error or str(failures[0].error).startswith(
        "Run run-1: the loss is not finite at step 3"
    )
    assert difference(found["run-0"], alone(0)) <= TOLERANCE
    assert difference(found["run-2"], alone(2)) <= TOLERANCE
    assert difference(found["run-1"], alone(1)[:2]) <= TOLERANCE
    assert all(bool(value.isfinite().all()) for value in failing.state().tensors.values())


def test_a_gradient_that_is_not_finite_changes_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tuning_run(0)
    before = run.state().tensors
    monkeypatch.setattr(run_module.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(TrainingDiverged, match="gradient is not finite at step 1"):
        list(train(run))
    assert all(torch.equal(value, before[name]) for name, value in run.state().tensors.items())


def test_two_runs_of_one_name_are_refused() -> None:
    cohort = Cohort()
    cohort.join(tuning_run(0))
    with pytest.raises(ValueError, match="name"):
        cohort.join(tuning_run(0))


def test_training_lowers_the_loss() -> None:
    batch, _ = RandomBatches(1, rows=4).take(0)
    curve = curves([tuning_run(1, data=OneBatch(batch), steps=60, learning_rate=0.1)])["run-1"]
    assert curve[-1][0] < 0.7 * curve[0][0]
