"""Configurations are chosen by shape, tuned once, and remembered where only their owner can write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from promptmux_kernels import batched, dispatch, triton_ops, use_form
from promptmux_kernels.triton_ops import configs, samples, tuner, warm_up
from promptmux_kernels.triton_ops.configs import Config, ShapeClass
from promptmux_kernels.triton_ops.samples import Widths

SHAPE = ShapeClass("prefix_attention", 64, "bfloat16", long=True)
OTHER = ShapeClass("cross_decode_attention", 64, "bfloat16", long=True)
ALL = [
    ShapeClass(op, head_dim, element, long)
    for op in configs._EXACT
    for head_dim in (64, 80)
    for element in ("bfloat16", "float16", "float32")
    for long in (False, True)
]


@pytest.fixture(autouse=True)
def forgotten_winners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_winners", {})


class Bench:
    """A fake device: the call notes the configuration it ran with, the timer answers from a script."""

    def __init__(self, times: dict[Config, float]) -> None:
        self.times = times
        self.timed: list[Config] = []

    def call(self) -> None:
        self.timed.append(configs.choose(SHAPE.op, torch.empty(1, 1, 64, dtype=torch.bfloat16), longest=930))

    def timer(self, call: tuner.Call) -> float:
        call()
        return self.times[self.timed[-1]]


def candidates() -> tuple[Config, ...]:
    return configs.candidates("sm_90", SHAPE)


def scripted(fastest: int) -> Bench:
    return Bench({config: float(abs(i - fastest)) for i, config in enumerate(candidates())})


def test_the_fastest_candidate_is_preferred_from_then_on(tmp_path: Path) -> None:
    bench = scripted(fastest=2)
    tuner.tune({SHAPE: bench.call}, "sm_90", tmp_path / "tuned", "H100", bench.timer)
    assert bench.timed == list(candidates())
    with configs.compiling_for("sm_90"):
        bench.call()
    assert bench.timed[-1] == candidates()[2]


def test_a_shape_on_record_is_not_timed_again_and_records_add_up(tmp_path: Path) -> None:
    bench = scripted(fastest=1)
    tuner.tune({SHAPE: bench.call}, "sm_90", tmp_path, "H100", bench.timer)
    count = len(bench.timed)
    first = configs.candidates("sm_90", OTHER)[0]
    tuner.tune({OTHER: lambda: None}, "sm_90", tmp_path, "H100", lambda call: 0.0)
    tuner.tune({SHAPE: bench.call, OTHER: bench.call}, "sm_90", tmp_path, "H100", bench.timer)
    assert len(bench.timed) == count
    assert configs._winners == {("sm_90", SHAPE): candidates()[1], ("sm_90", OTHER): first}


def test_a_record_that_is_no_candidate_any_more_is_ignored(tmp_path: Path) -> None:
    bench = scripted(fastest=0)
    tuner.tune({SHAPE: bench.call}, "sm_90", tmp_path, "H100", bench.timer)
    (file,) = tmp_path.iterdir()
    entries = json.loads(file.read_text())
    file.write_text(json.dumps({key: entry | {"warps": 7} for key, entry in entries.items()}))
    tuner.tune({SHAPE: bench.call}, "sm_90", tmp_path, "H100", bench.timer)
    assert len(bench.timed) == 2 * len(candidates())


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777], ids=oct)
def test_a_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(tuner.UnsafeDirectory, match="can be written by others"):
        tuner.tune({}, "sm_90", tmp_path, "H100", lambda call: 0.0)


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(tuner.UnsafeDirectory, match="belongs to user"):
        tuner.own_directory(tmp_path)


def test_a_missing_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    tuner.own_directory(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("where", ["interpreter", "sm_80", "sm_90", "sm_100", "gfx942"])
def test_all_candidates_of_a_shape_cut_keys_alike(where: str) -> None:
    """So that neither the tuner nor a neighbour's length changes a row's bits."""
    for shape in ALL:
        by_length = [
            configs.candidates(where, ShapeClass(shape.op, shape.head_dim, shape.element, long))
            for long in (False, True)
        ]
        assert len({config.keys for found in by_length for config in found}) == 1, shape


def test_only_targets_with_a_copy_engine_use_descriptors() -> None:
    descriptors = {
        where: any(config.descriptor for shape in ALL for config in configs.candidates(where, shape))
        for where in ("interpreter", "sm_80", "sm_90", "sm_100", "gfx942")
    }
    assert descriptors == {"interpreter": False, "sm_80": False, "sm_90": True, "sm_100": True, "gfx942": False}


@pytest.fixture
def small() -> Iterator[Widths]:
    with use_form("triton"):
        yield Widths(1, 16, 64, torch.float32, torch.device("cpu"))


def test_warming_up_tunes_first_and_then_calls_every_variant(
    small: Widths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    timed: list[tuner.Call] = []
    monkeypatch.setattr(warm_up, "PICTURE", 4)
    monkeypatch.setattr(warm_up, "variants", lambda widths: iter([lambda: made.append("called")] * 3))
    choices = {op: (*found, Config(32, 64, 4, 1)) for op, found in configs._INTERPRETED.items()}
    monkeypatch.setattr(configs, "_INTERPRETED", choices)

    def timer(call: tuner.Call) -> float:
        assert not made
        timed.append(call)
        return float(len(timed))

    assert warm_up.warm_up(small, tmp_path / "tuned", timer) == 3
    assert made == ["called"] * 3
    assert len(configs._winners) == len(timed) / 2 == 10


def test_a_variant_runs(small: Widths) -> None:
    samples.encoder_attention(small, [3], [1], factors=True)()
    samples.decode_step(small, 2, 3, 4, [1, 0])()


def test_gpus_are_answered_by_triton_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch._fastest(torch.device("cuda", 1)) == "triton"
    assert dispatch._fastest(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert dispatch._fastest(torch.device("cuda")) == "batched"


def test_triton_answers_unless_a_gradient_is_wanted() -> None:
    frozen, prompt = torch.zeros(1), torch.zeros(1, requires_grad=True)
    with use_form("triton"):
        assert dispatch._form(frozen, frozen) is triton_ops
        assert dispatch._form(frozen, prompt) is batched
        with torch.no_grad():
            assert dispatch._form(frozen, prompt) is triton_ops


def test_a_device_that_triton_cannot_serve_is_served_by_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("no C compiler found")

    monkeypatch.setattr(dispatch, "_refused", set())
    monkeypatch.setattr(warm_up, "warm_up", fail)
    assert prepare_gpu() == 0
    assert "no C compiler found" in caplog.text
    assert dispatch._fastest(torch.device("cuda")) == "batched"


def test_a_directory_that_others_can_write_stops_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise tuner.UnsafeDirectory("chmod go-w it")

    monkeypatch.setattr(warm_up, "warm_up", refuse)
    with pytest.raises(tuner.UnsafeDirectory):
        prepare_gpu()


def prepare_gpu() -> int:
    device = torch.device("cuda")
    return dispatch.prepare(heads=1, head_dim=64, ffn_dim=64, dtype=torch.float16, device=device, tuned_in=None)


def test_a_candidate_that_the_device_has_no_room_for_is_passed_over(tmp_path: Path) -> None:
    bench = scripted(fastest=0)

    def timer(call: tuner.Call) -> float:
        time = bench.timer(call)
        if bench.timed[-1] == candidates()[0]:
            raise OutOfResources(200_000, 101_376, "shared memory")
        return time

    tuner.tune({SHAPE: bench.call}, "sm_90", tmp_path, "H100", timer)
    assert configs._winners[("sm_90", SHAPE)] == candidates()[1]


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_a_torn_record_is_tuned_anew(tmp_path: Path, content: str) -> None:
    for _ in range(2):
        bench = scripted(fastest=1)
        tuner.tune({SHAPE: bench.call}, "sm_90", tmp_path, "H100", bench.timer)
        assert bench.timed == list(candidates())
        (file,) = tmp_path.iterdir()
        file.write_text(content)
