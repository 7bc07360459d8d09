"""A disk that fills up at any write of a training ends it in order, costs nothing that was kept, and is gone on from.

One run is gone on with again and again, each time until the next kind of write that it has not been refused yet.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.full_disk import FullDisk, Kind
from promptmux_server.cli.training_scores import keep_learned, score_served
from promptmux_server.errors import PromptmuxError
from promptmux_server.training.checkpoint import Checkpoints
from promptmux_server.training.curve import write_durably
from promptmux_server.training.job import held
from promptmux_server.training.recipe import StepRecipe
from training.job_worker import config, data, job

SHORT = StepRecipe(steps=2, learning_rate=0.05)


CACHE = "feature_cache.py:flush"
"""Written when a run ends, also when that is because the disk is full already."""
WRITERS = {
    "checkpoint.py:held",
    "checkpoint.py:_write",
    "curve.py:add",
    "curve.py:add_score",
    "curve.py:go_back",
    CACHE,
    "lines.py:_index",
    "survey.py:survey",
    "training_scores.py:keep_learned",
    "training_scores.py:score_served",
}
"""All that a run writes by: each must have been refused at least once."""


def train(folder: Path) -> str:
    """As the command does it; the digest of what was learned."""
    with (
        held(config(folder, steps=SHORT, validate_every=1)),
        job(folder, scorer=score_served, steps=SHORT, validate_every=1) as opened,
    ):
        opened.resume()
        write_durably(opened.config.output / "config.toml", b"as it was written")
        list(opened.events())
        return keep_learned(opened).sha256


def steps_kept(folder: Path) -> int:
    newest = Checkpoints(folder / "out" / "checkpoints").newest()
    return 0 if newest is None else newest.mark.step


@pytest.mark.parametrize("once", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["lasting", "once"])
def test_every_write_of_a_run_may_be_refused(tmp_path: Path, once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data(tmp_path / "whole"), data(tmp_path / "disk")
    expected = train(tmp_path / "whole")
    met: set[Kind] = set()
    seen: set[Kind] = set()
    refusals: dict[Kind, str] = {}
    while True:
        disk, before = FullDisk(but_for=frozenset(met), once=once), steps_kept(tmp_path / "disk")
        with monkeypatch.context() as patched:
            disk.take_over(patched)
            try:
                assert train(tmp_path / "disk") == expected
            except PromptmuxError as error:
                refusals[disk.refused[0]] = error.message
        assert steps_kept(tmp_path / "disk") >= before
        if not disk.refused:
            break
        met.add(disk.refused[0])
        seen.update(disk.refused)
    for kind, message in refusals.items():
        assert "make room" in message.lower(), (kind, message)
        assert str(tmp_path) not in message
    assert {caller for kind in seen for caller in kind} >= (WRITERS - {CACHE} if once else WRITERS)
