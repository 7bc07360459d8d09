"""The cost model: it finds the device's lines, never a negative one, and says how wrong it is."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmux_server.engine.cost_model import STAGES, Coefficients, CostModel, Line, Stage, WorkSize

TRUE = Coefficients(Line(3.0, 40.0), Line(8.0, 0.05), Line(12.0, 0.9))


def fed(passes: int, noise: float = 0.0, truth: Coefficients = TRUE, model: CostModel | None = None) -> CostModel:
    chance, model = random.Random(5), model or CostModel()
    for _ in range(passes):
        for stage in STAGES:
            count = chance.randint(1, 200)
            model.observe(stage, count, truth.of(stage).at(count) * chance.uniform(1 - noise, 1 + noise))
    return model


@pytest.mark.parametrize("stage", STAGES)
def test_it_finds_the_lines_of_the_device(stage: Stage) -> None:
    before, after = CostModel(), fed(400)
    for count in (1, 30, 200):
        assert after.predict(stage, count) == pytest.approx(TRUE.of(stage).at(count), rel=0.02)
    assert before.predict(stage, 200) != pytest.approx(TRUE.of(stage).at(200), rel=0.02)


def test_it_follows_a_device_that_becomes_slower() -> None:
    slower = Coefficients(*(Line(3 * TRUE.of(stage).constant_ms, 3 * TRUE.of(stage).slope_ms) for stage in STAGES))
    model = fed(400, truth=slower, model=fed(400))
    assert model.predict("step", 100) == pytest.approx(slower.step.at(100), rel=0.02)


def test_the_error_ratio_is_that_of_the_noise_and_rises_when_the_device_changes() -> None:
    assert CostModel().error_ratios == {}
    exact, noisy = fed(400), fed(400, noise=0.2)
    assert all(exact.error_ratios[stage] < 0.01 for stage in STAGES)
    assert all(0.03 < noisy.error_ratios[stage] < 0.3 for stage in STAGES)
    exact.observe("step", 10, 10 * TRUE.step.at(10))
    assert exact.error_ratios["step"] > 0.04


@given(
    st.lists(
        st.tuples(st.sampled_from(STAGES), st.integers(1, 5000), st.floats(0, 1e6)),
        max_size=80,
    )
)
def test_no_measurements_make_a_line_negative_or_an_estimate_zero(passes: list[tuple[Stage, int, float]]) -> None:
    model = CostModel()
    for stage, count, measured_ms in passes:
        model.observe(stage, count, measured_ms)
        line = model.coefficients.of(stage)
        assert line.constant_ms >= 0
        assert line.slope_ms >= 0
        assert math.isfinite(line.at(5000))
    assert model.estimate(WorkSize(True, 100, 5, 20.0)) > 0
    assert model.estimate(WorkSize(False, 1, 1, 0.0)) > 0


def test_counts_that_never_vary_scale_the_line_and_keep_its_shape() -> None:
    model = CostModel(Coefficients(step=Line(6.0, 0.5)))
    for _ in range(600):
        model.observe("step", 32, 44.0)
    assert model.predict("step", 32) == pytest.approx(44.0, rel=0.01)
    assert 0 < model.predict("step", 1) < 44.0


def test_counts_that_hardly_vary_do_not_make_a_slope_of_noise() -> None:
    chance, model = random.Random(2), CostModel(Coefficients(step=Line(6.0, 0.5)))
    for _ in range(2000):
        model.observe("step", chance.randint(31, 33), 22.0 * chance.uniform(0.9, 1.1))
        assert 0.25 <= model.coefficients.step.slope_ms <= 1.0


def test_one_compilation_does_not_own_the_fit() -> None:
    model = fed(400)
    model.observe("step", 50, 60_000.0)
    assert model.predict("step", 50) < 2 * TRUE.step.at(50)


@pytest.mark.parametrize(("count", "measured_ms"), [(0, 1.0), (-1, 1.0), (1, -1.0), (1, math.nan), (1, math.inf)])
def test_what_no_clock_can_measure_is_refused(count: int, measured_ms: float) -> None:
    with pytest.raises(ValueError, match="cannot take"):
        CostModel().observe("stem", count, measured_ms)


def test_an_estimate_adds_up_the_passes_of_a_request() -> None:
    model = CostModel(TRUE)
    picture = WorkSize(picture=True, source_tokens=100, beams=5, expected_steps=10)
    text = WorkSize(picture=False, source_tokens=100, beams=5, expected_steps=10)
    assert model.estimate(text) == pytest.approx((8 + 5) + 10 * (12 + 4.5))
    assert model.estimate(picture) - model.estimate(text) == pytest.approx(43)


def test_the_estimates_of_a_batch_add_up_to_the_batch() -> None:
    model, size = CostModel(TRUE), WorkSize(True, 100, 5, 10)
    batch_ms = TRUE.stem.at(8) + TRUE.encode.at(800) + 10 * TRUE.step.at(40)
    assert 8 * model.estimate(size, shared_by=8) == pytest.approx(batch_ms)


def test_steps_are_learned_for_each_task_and_never_over_the_longest_allowed() -> None:
    model = CostModel()
    assert model.expected_steps("caption", 16) == 16
    for _ in range(60):
        model.learn_steps("caption", 9)
        model.learn_steps("vqa", 2)
    assert model.expected_steps("caption", 16) == pytest.approx(9)
    assert model.expected_steps("vqa", 16) == pytest.approx(2)
    assert model.expected_steps("caption", 4) == 4
    model.learn_steps("caption", 19)
    assert 9 < model.expected_steps("caption", 16) < 11


def test_a_caller_waits_for_as_many_turns_as_its_answer_has_steps() -> None:
    size = WorkSize(picture=False, source_tokens=10, beams=1, expected_steps=8.0)
    model = fed(400)
    assert model.time_in_batch_ms(size) == 0.0
    for _ in range(100):
        model.observe_turn(30.0)
    encode_ms = TRUE.encode.at(10)
    assert model.time_in_batch_ms(size) == pytest.approx(8 * 30.0 + encode_ms, rel=0.05)
