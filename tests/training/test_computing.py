"""Other ways to compute a pass: the same is learned, but for rounding where bfloat16 rounds."""

from __future__ import annotations

import pytest
import torch

import tiny
from promptmux_kernels import Rows
from promptmux_server.backbone.assemble import assemble
from promptmux_server.training import passes
from promptmux_server.training.chance import Chance
from promptmux_server.training.noise import BatchNoise, RunNoise
from promptmux_server.training.recipe import ComputeRecipe
from tuning_cases import curves, difference, tuning_run

NOISY = {"backbone_dropout": 0.2, "backbone_drop_path": 0.4}


def test_recomputed_layers_leave_out_what_they_left_out_before() -> None:
    plain, recomputed = (
        curves([tuning_run(i, **NOISY) for i in (0, 1)], ComputeRecipe(recompute=recompute))
        for recompute in (False, True)
    )
    assert all(difference(recomputed[name], plain[name]) <= 1e-5 for name in plain)


def test_recomputing_keeps_less() -> None:
    def kept_bytes(recompute: bool) -> int:
        sizes: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        run = tuning_run(1, steps=1)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            curves([run], ComputeRecipe(recompute=recompute))
        return sum(sizes.values())

    assert kept_bytes(True) < 0.7 * kept_bytes(False)


def test_autocast_rounds_and_still_learns_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "serving_dtype", lambda device: torch.bfloat16)
    run = tuning_run(1)
    found, expected = curves([run], ComputeRecipe(autocast=True)), curves([tuning_run(1)])
    assert 1e-6 < difference(found["run-1"][:1], expected["run-1"][:1]) < 0.03
    assert {value.dtype for value in run.state().tensors.values()} == {torch.float32}


def test_without_native_bfloat16_autocast_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "serving_dtype", lambda device: torch.float32)
    assert curves([tuning_run(1)], ComputeRecipe(autocast=True)) == curves([tuning_run(1)])


def test_a_backbone_in_bfloat16_takes_prompts_in_float32() -> None:
    model = assemble(tiny.backbone(), dtype=torch.bfloat16)
    run = tuning_run(1, model=model)
    assert difference(curves([run])["run-1"][:1], curves([tuning_run(1)])["run-1"][:1]) < 0.03
    assert {value.dtype for value in run.state().tensors.values()} == {torch.float32}


ROWS = Rows.packed([3, 5, 4])
NOISE = BatchNoise(
    [
        RunNoise(Chance(seed=1, step=0, part=0), rows=2, dropout=0.5, drop_path=0.0),
        RunNoise(Chance(seed=2, step=0, part=0), rows=1, dropout=0.0, drop_path=0.5),
    ]
)


def test_each_runs_rows_have_its_own_rates() -> None:
    x = torch.ones(12, 1000)
    dropped = NOISE.at("encoder.1", 1.0, ROWS).elements(x)
    assert 0.45 < float((dropped[:8] == 0).float().mean()) < 0.55
    assert set(dropped[:8].unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped[8:], x[8:])


def test_stochastic_depth_leaves_out_whole_rows_and_rises_with_depth() -> None:
    x = torch.ones(12, 4)
    seen = [NOISE.at(f"encoder.{place}", 1.0, ROWS).branches(x)[8:] for place in range(64)]
    assert {tuple(part.unique().tolist()) for part in seen} == {(0.0,), (2.0,)}
    assert torch.equal(NOISE.at("encoder.0", 0.0, ROWS).branches(x), x)


def test_a_place_draws_anew_each_time_and_the_same_when_asked_again() -> None:
    x = torch.ones(12, 50)
    first = NOISE.at("encoder.1", 1.0, ROWS)
    drawn = [first.elements(x), first.elements(x)]
    again = NOISE.at("encoder.1", 1.0, ROWS)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(again.elements(x), drawn[0])
    assert torch.equal(again.elements(x), drawn[1])
