"""Checkpoints are whole or not there: whatever fails or dies while one is written, the last good one is found."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch

from promptmux_prompts.disk import Disk
from promptmux_server.errors import CheckpointNotWritten, TrainingError
from promptmux_server.training.checkpoint import Checkpoints
from promptmux_server.training.run import RunState

IDENTITY = {"backbone": "one", "steps": {"learning_rate": 0.03}}


def state(step: int) -> RunState:
    tensors = {"parameter/a": torch.full((3,), float(step)), "step/a": torch.tensor(float(step))}
    return RunState(tensors, {"step": step, "cursor": {"epoch": 0, "position": step}})


def saved(folder: Path, *steps: int, scores: dict[int, float] | None = None, keep_last: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep_last=keep_last)
    for step in steps:
        checkpoints.save(state(step), IDENTITY, (scores or {}).get(step))
    return checkpoints


def found(folder: Path) -> int | None:
    newest = Checkpoints(folder).newest()
    return None if newest is None else newest.mark.step


class Killed(BaseException):
    """Nothing of the process goes on behind it."""


class FailingDisk(Disk):
    """Fails at the n-th change."""

    def __init__(self, root: Path, nth: int, error: BaseException) -> None:
        super().__init__(root)
        self._left, self._error = nth, error

    def _change(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise self._error

    def make_folder(self, place: str) -> None:
        self._change()
        super().make_folder(place)

    def write(self, file: int, data: bytes) -> None:
        self._change()
        super().write(file, data[: len(data) // 2])
        self._change()
        super().write(file, data[len(data) // 2 :])

    def sync(self, file: int) -> None:
        self._change()
        super().sync(file)

    def rename(self, old: str, new: str) -> None:
        self._change()
        super().rename(old, new)

    def sync_folder(self, place: str) -> None:
        self._change()
        super().sync_folder(place)


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    newest = saved(tmp_path, 7, scores={7: 0.5}).newest()
    assert newest is not None
    assert newest.identity == IDENTITY
    assert newest.state.numbers == state(7).numbers
    assert all(torch.equal(newest.state.tensors[name], tensor) for name, tensor in state(7).tensors.items())
    assert newest.mark.score == 0.5


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3, 4, 5, scores={1: 0.2, 2: 0.9, 3: 0.9, 4: 0.1})
    assert [mark.step for mark in checkpoints.marks()] == [2, 4, 5]
    best = checkpoints.best()
    assert best is not None
    assert best.mark.step == 2  # the earlier of equal ones


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert found(tmp_path) is None
    assert Checkpoints(tmp_path).best() is None


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["torn", "flipped", "gone", "empty"])
def test_a_damaged_checkpoint_is_set_aside_with_a_word(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1, 2)
    (folder,) = tmp_path.glob("*-step-2")
    data = (folder / file).read_bytes()
    middle = len(data) // 2
    spoilt = {"torn": data[:middle], "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]}
    if damage == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(spoilt.get(damage, b""))
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path) == 1
    assert "checkpoint of step 2 is damaged" in caplog.text
    saved(tmp_path, 3)
    assert [mark.step for mark in Checkpoints(tmp_path).marks()] == [1, 3]


def test_an_undamaged_one_is_passed_over_by_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 1, 2)
    assert found(tmp_path) == 2
    assert caplog.text == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_anywhere_costs_no_earlier_checkpoint(tmp_path: Path, number: int) -> None:
    refused = []
    for nth in range(1, 40):
        folder = tmp_path / str(nth)
        saved(folder, 1, 2)
        checkpoints = Checkpoints(folder, disk=FailingDisk(folder, nth, OSError(number, os.strerror(number))))
        try:
            checkpoints.save(state(3), IDENTITY)
        except CheckpointNotWritten as error:
            refused.append(error.message)
        assert found(folder) in (2, 3)
    assert len(refused) >= 10
    for message in refused:
        assert message.startswith("The checkpoint of step 3 cannot be written: ")
        assert ("the disk is full. Make room" in message) is (number == errno.ENOSPC)
        assert str(tmp_path) not in message


def test_death_anywhere_leaves_the_last_whole_checkpoint(tmp_path: Path) -> None:
    ends = []
    for nth in range(1, 40):
        folder = tmp_path / str(nth)
        saved(folder, 1, 2)
        try:
            Checkpoints(folder, disk=FailingDisk(folder, nth, Killed())).save(state(3), IDENTITY)
        except Killed:
            ends.append(found(folder))
        with Checkpoints(folder).held():
            assert not list(folder.glob("unfinished-*"))
        assert found(folder) in (2, 3)
    assert set(ends) == {2, 3}


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path).held(),
        pytest.raises(TrainingError, match="Another process"),
        Checkpoints(tmp_path).held(),
    ):
        pass
    with Checkpoints(tmp_path).held():
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointNotWritten, match="cannot be made"):
        Checkpoints(tmp_path / "file" / "checkpoints")
