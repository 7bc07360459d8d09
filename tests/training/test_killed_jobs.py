"""A run that is killed at any moment, again and again, ends with the prompt of an undisturbed one, bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from training.job_worker import STEPS, Forks, data, forks, recipe, run_to_the_end

PATIENCE_S = 60.0


def steps_taken(folder: Path) -> int:
    log = folder / "steps.log"
    return len(log.read_text().split()) if log.exists() else 0


def kill_behind(started: Forks, folder: Path, steps: int, more: int, delay_s: float) -> int:
    """Run, and kill after so many more steps and a moment; what the process ended with."""
    enough, process, begun_s = steps_taken(folder) + more, started.start(folder, steps), time.monotonic()
    while steps_taken(folder) < enough and not (folder / "digest").exists() and time.monotonic() - begun_s < PATIENCE_S:
        time.sleep(0.001)
    time.sleep(delay_s)
    return started.kill(process)


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.soak)])
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path, kills: int) -> None:
    steps = STEPS * kills // 5  # the run must last until the last one
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    data(undisturbed), data(disturbed)
    expected = run_to_the_end(undisturbed, steps=recipe(steps)).digest
    rng = random.Random(kills)
    with forks() as started:
        killed = [
            kill_behind(started, disturbed, steps, rng.randrange(1, 7), rng.uniform(0.0, 0.03)) for _ in range(kills)
        ]
        assert started.wait(started.start(disturbed, steps)) == 0
    assert killed == [-9] * kills
    assert (disturbed / "digest").read_text() == expected
    assert (disturbed / "out/curve.jsonl").read_bytes() == (undisturbed / "out/curve.jsonl").read_bytes()
    assert steps_taken(disturbed) > steps  # some steps were taken twice, so kills did cost something


def test_bits_that_a_checkpoint_forgets_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from promptmux_server.training.run import Run
    from training.job_worker import job

    data(tmp_path)
    expected = run_to_the_end(tmp_path).digest
    other = tmp_path / "other"
    data(other)
    with job(other) as opened:
        opened.resume()
        events = opened.events(lambda: opened.run.step == 10)
        assert [type(event).__name__ for event in events][-1] == "Stopped"
    restore = Run.restore

    def forgetful(run: Run, state: object) -> None:
        restore(run, state)  # type: ignore[arg-type]
        run._optimizer.state.clear()

    monkeypatch.setattr(Run, "restore", forgetful)
    assert run_to_the_end(other).digest != expected
