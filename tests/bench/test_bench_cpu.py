"""The benchmark measures what it says: the released form computes our answers, and busy neighbours are noticed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

import tiny
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.bench import clock, cpu, workload
from promptmux_server.bench.clock import Timing
from promptmux_server.bench.cpu import CpuBench, Released, Row
from promptmux_server.bench.released import ReleasedForm
from promptmux_server.cli import app
from promptmux_server.engine.decoding import make_search
from promptmux_server.tasks.decoding import DecodingParams


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_the_released_form_computes_the_same_captions() -> None:
    model = workload.build_models(equal_sides(), torch.float32).plain
    images = model.image_tokens(workload.pictures(model.config, 2, torch.float32, 64))
    lengths = [3, 0]
    rows = workload.encoder_rows(model.config, images, 2)
    pairs = workload.prompt_pairs(model.config, lengths, torch.float32)
    form = ReleasedForm(model, [pairs[1], pairs[0]])
    states, padding = form.encode(rows)
    prompts = workload.pack_prompts(pairs, [1, 0])
    ours = model.encode(rows, prompts)
    expected = torch.cat([state[~hidden] for state, hidden in zip(states, padding, strict=True)])
    torch.testing.assert_close(ours.states, expected, atol=2e-5, rtol=0)
    params = DecodingParams(method="beam", beam_size=3, max_length=4, min_length=4)
    works = [workload.Work(tuple(row.source), (0,), row.image, make_search(params)) for row in rows]
    batch = workload.closed_batch(model, works, workload.BatchPrompts(prompts, prompts))
    while batch.live_rows:
        batch.step()
    # The order may differ: hypotheses are ranked with their eos, which the bare search leaves out.
    found = [sorted(list(h.tokens[:4]) for h in work.search.outcome().hypotheses) for work in works]
    assert [sorted(beams) for beams in form.caption(rows, beam=3, steps=4).tolist()] == found


def test_every_line_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "GEMM_SIDE", 64)
    monkeypatch.setattr(cpu, "STREAM_BYTES", 1 << 20)
    bench = CpuBench(equal_sides(), torch.float32, batch=2, pixels=64, quick=True)
    released = Released(Timing(10.0, 1, True), Timing(10.0, 1, True), Timing(1000.0, 1, True))
    rows = {row.op: row for row in bench.rows(released, released)}
    assert len(rows) == 11
    assert all(row.ms > 0 for row in rows.values())
    attention = rows["attention, one encoder layer"]
    assert attention.error is not None
    assert attention.error < 1e-5
    assert attention.ratio_tuned == pytest.approx(10.0 * 1e3 / attention.ms)
    assert rows["caption request, 16 steps, per request"].met is True


def equal_sides() -> BackboneConfig:
    """The tiny backbone with as many decoder as encoder layers: the workload gives both sides one prompt."""
    return replace(tiny.config(), decoder_layers=tiny.config().encoder_layers)


def test_a_target_is_missed_when_one_ratio_is_too_small() -> None:
    row = Row("op", 100.0, True)
    bench = object.__new__(CpuBench)
    fast, slow = Timing(1.0, 5, True), Timing(0.4, 5, False)
    met = bench._compared(row, fast, fast, least=5.0, least_shipped=10.0)
    assert (met.ratio_tuned, met.ratio_shipped, met.met, met.clean) == (10.0, 10.0, True, True)
    assert bench._compared(row, fast, slow, least=5.0, least_shipped=10.0).met is False
    assert bench._compared(row, slow, None, least=5.0).met is False
    assert bench._compared(row, slow, None).met is None


def test_a_busy_neighbour_makes_a_sample_unclean(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter(range(1000))
    monkeypatch.setattr(clock, "_busy_s", lambda: float(next(busy)))
    timing = clock.sample([lambda: time.sleep(0.001)] * 4, samples=3)
    assert timing.samples == 4
    assert not timing.clean


def test_an_idle_machine_gives_clean_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_busy_s", lambda: 0.0)
    monkeypatch.setattr(clock, "_own_s", lambda: 0.0)
    calls: list[int] = []
    timing = clock.measure(lambda: calls.append(1), samples=3)
    assert (timing.samples, timing.clean, len(calls)) == (3, True, 4)


def test_an_unknown_size_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "cpu", "--size", "enormous"], env={"GLIBC_TUNABLES": ""})
    assert result.exit_code == 1
    assert "enormous" in result.stderr


def test_released_times_survive_the_way_between_processes() -> None:
    released = Released(*(Timing(float(i), i, i % 2 == 0) for i in range(3)))
    found = json.loads(json.dumps(asdict(released)))
    assert Released(**{name: Timing(**timing) for name, timing in found.items()}) == released
