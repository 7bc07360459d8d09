"""The counts of the roofline are those of the design, and scale as they must."""

from __future__ import annotations

import pytest

from promptmux_kernels.bench import roofline, timing
from promptmux_kernels.bench.roofline import BASE, H100, LARGE, Load, Model

LOAD = Load()


def flops(model: Model, op: str) -> float:
    return next(cost.flops for cost in roofline.prefill(model, LOAD, 1) if cost.op == op) / 1e9


@pytest.mark.parametrize(
    ("op", "base", "large"),
    [
        ("vision stem", 64.2, 98.3),
        ("image projection", 1.4, 1.9),
        ("QKV", 19.7, 70.2),
        ("attention out", 6.6, 23.4),
        ("prefix_attention", 17.0, 45.4),
        ("cross K/V", 13.2, 46.8),
    ],
)
def test_prefill_counts_are_those_of_the_design(op: str, base: float, large: float) -> None:
    """GFLOP of one request at 480 px with 30 text tokens and a prompt of 64."""
    assert flops(BASE, op) == pytest.approx(base, abs=0.06)
    assert flops(LARGE, op) == pytest.approx(large, abs=0.06)


@pytest.mark.parametrize(
    ("model", "gflop", "floor_ms"), [(BASE, 175, 0.219), (LARGE, 473, 0.593)], ids=["base", "large"]
)
def test_a_whole_prefill_has_the_known_floor(model: Model, gflop: float, floor_ms: float) -> None:
    total = sum(cost.flops for cost in roofline.prefill(model, LOAD, 1))
    assert total / 1e9 == pytest.approx(gflop, rel=0.003)
    assert total / H100.flops_per_second * 1e3 == pytest.approx(floor_ms, rel=0.003)


@pytest.mark.parametrize(
    ("model", "batch", "megabytes"),
    [(BASE, 1, 209), (BASE, 8, 343), (BASE, 32, 800), (LARGE, 1, 525), (LARGE, 8, 881), (LARGE, 32, 2100)],
)
def test_a_steps_bytes_are_those_of_the_design(model: Model, batch: int, megabytes: float) -> None:
    """The design leaves norms and cache writes out: they are under 4 % of a step."""
    costs = roofline.decode_step(model, LOAD, batch)
    small = [cost for cost in costs if "norm" in cost.op or cost.op == "write_cache"]
    total, extra = (sum(cost.bytes for cost in group) / 1e6 for group in (costs, small))
    assert total - extra == pytest.approx(megabytes, rel=0.003)
    assert extra < 0.04 * total


def test_beams_share_what_they_share() -> None:
    """Five beams read a request's keys once: only their own history grows."""
    for op, growth in (("cross_decode_attention", 1.0), ("prefix_decode_attention", 1.5)):
        one, five = (
            next(c.bytes for c in roofline.decode_step(BASE, Load(beams=beams), 8) if c.op == op) for beams in (1, 5)
        )
        assert one <= five < one * growth * 1.01


def test_the_table_has_every_op_of_both_models_and_phases() -> None:
    lines = roofline.table(batches=(8,))
    assert {(line.model, line.phase) for line in lines} == {
        (model, phase) for model in ("OFA-base", "OFA-large") for phase in ("prefill", "step")
    }
    assert all(line.floor_us > 0 for line in lines)
    assert all(line.floor_us_per_request == line.floor_us / 8 for line in lines)


def test_every_timed_op_has_a_floor() -> None:
    assert {cost.op for cost in timing.per_layer(BASE, LOAD, 8)} == set(timing._CALLS)


def test_without_a_gpu_nothing_is_timed_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(timing.NoGpu, match="no GPU"):
        next(timing.timings())
