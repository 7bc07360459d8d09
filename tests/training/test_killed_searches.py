"""A search that is killed at any moment, again and again, draws and scores what an undisturbed one does."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from promptmux_server.training.search.study import Study
from training import job_worker
from training.search_cases import lonely_search, run

PATIENCE_S = 60.0


def lines(folder: Path) -> int:
    journal = folder / "search/journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def kill_behind(started: job_worker.Forks, folder: Path, written: int) -> int:
    """Go on, and kill after so many more lines of the journal; what the process ended with."""
    enough, process, begun_s = lines(folder) + written, started.start(folder), time.monotonic()
    while lines(folder) < enough and not (folder / "done").exists() and time.monotonic() - begun_s < PATIENCE_S:
        time.sleep(0.001)
    return started.kill(process)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path: Path, kills: int) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    expected = run(lonely_search(undisturbed))[1]
    job_worker.data(disturbed)
    rng = random.Random(kills)
    killed: list[int] = []
    with job_worker.forks("training.search_cases") as started:
        killed += [kill_behind(started, disturbed, rng.randrange(3, 20)) for _ in range(kills)]
        assert started.wait(started.start(disturbed)) == 0
    assert killed.count(-9) >= 2
    assert Study.read(disturbed / "search").trials() == expected
    for trial in expected:
        curve = f"search/trials/{trial.name}/curve.jsonl"
        assert (disturbed / curve).read_bytes() == (undisturbed / curve).read_bytes()
