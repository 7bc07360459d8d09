"""A run's state on disk: one folder a checkpoint, whole or not there, whatever dies while it is written.

Owns the layout, the order of writes, which checkpoints are kept, and who may write. Knows no method, data or model.

    000007-step-350/state.json             what the run is, where it stands, the tensors' digest; carries its own digest
    000007-step-350/tensors.safetensors    parameters, averages and the optimiser's moments
    unfinished-*/                          left by a process that died, or given up: removed at the next start
    damaged-*/                             set aside when it was read; nothing reads it again
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors

from promptmux_prompts.disk import Disk
from promptmux_server.errors import CheckpointNotWritten, RunHeld
from promptmux_server.training.run import RunState

log = logging.getLogger(__name__)

FORMAT = 1
STATE, TENSORS, LOCK = "state.json", "tensors.safetensors", "lock"
NAME = re.compile(r"(\d{6})-step-(\d+)")
UNFINISHED, DAMAGED = "unfinished-", "damaged-"
MOST_JSON_BYTES = 1 << 20

Identity = Mapping[str, Any]
"""What a run is, as JSON values by topic: a checkpoint is only for a run that is the same in all of them."""


class _Damaged(Exception):
    """A folder that is no whole checkpoint."""


@dataclass(frozen=True)
class Mark:
    """A checkpoint without its tensors; `serial` grows with every one that is written."""

    name: str
    serial: int
    step: int
    score: float | None
    """On the validation set, if it was asked at this step."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and checked."""

    mark: Mark
    identity: Identity
    state: RunState


class Checkpoints:
    """The checkpoints of one run, in a folder of their own."""

    def __init__(self, folder: Path, *, keep_last: int = 2, disk: Disk | None = None) -> None:
        """Raises CheckpointNotWritten if the folder cannot be made."""
        self._folder, self._keep_last = folder, keep_last
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_written("The folder of checkpoints cannot be made", error) from error
        self._disk = disk or Disk(folder.resolve())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the only one who writes here, and clear what a dead process left; raises RunHeld, CheckpointNotWritten."""
        with held_folder(self._folder):
            for leftover in self._folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield

    def save(self, state: RunState, identity: Identity, score: float | None = None) -> Mark:
        """Write a checkpoint that outlives a power cut, then remove those that are no longer kept.

        Raises CheckpointNotWritten; all that were there before still are.
        """
        marks = self.marks()
        step, serial = int(str(state.numbers["step"])), 1 + max((mark.serial for mark in marks), default=0)
        mark = Mark(f"{serial:06d}-step-{step}", serial, step, score)
        unfinished = f"{UNFINISHED}{secrets.token_hex(6)}"
        try:
            self._write(unfinished, mark, state, identity)
        except OSError as error:
            shutil.rmtree(self._folder / unfinished, ignore_errors=True)
            raise not_written(f"The checkpoint of step {step} cannot be written", error) from error
        self._prune([*marks, mark])
        return mark

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; what is damaged is set aside, with a word in the log."""
        for mark in sorted(self.marks(), key=lambda mark: mark.serial, reverse=True):
            found = self._read_or_tell(mark)
            if found is not None:
                return found
        return None

    def best(self) -> Checkpoint | None:
        """The whole checkpoint of the highest score, the earliest of equal ones."""
        scored = [mark for mark in self.marks() if mark.score is not None]
        for mark in sorted(scored, key=_merit, reverse=True):
            found = self._read_or_tell(mark)
            if found is not None:
                return found
        return None

    def marks(self) -> list[Mark]:
        """What is there, by age; a folder whose state cannot be read counts as one without a score."""
        found = []
        for name in sorted(self._disk.names("")):
            match = NAME.fullmatch(name)
            if match:
                try:
                    score = self._state(name)["score"]
                except _Damaged:
                    score = None
                found.append(Mark(name, int(match[1]), int(match[2]), score))
        return found

    def _write(self, unfinished: str, mark: Mark, state: RunState, identity: Identity) -> None:
        tensors = serialise_tensors({name: value.detach().cpu().contiguous() for name, value in state.tensors.items()})
        said = {
            "format": FORMAT,
            "numbers": state.numbers,
            "identity": dict(identity),
            "score": mark.score,
            "tensors": {"bytes": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()},
        }
        self._disk.make_folder(unfinished)
        for name, data in ((TENSORS, tensors), (STATE, _sealed(said))):
            file, place = self._disk.create(unfinished)
            try:
                self._disk.write(file, data)
                self._disk.sync(file)
            finally:
                self._disk.close(file)
            self._disk.rename(place, f"{unfinished}/{name}")
        self._disk.sync_folder(unfinished)
        self._disk.rename(unfinished, mark.name)
        self._disk.sync_folder("")

    def _prune(self, marks: list[Mark]) -> None:
        """Keep the last ones and the best: an earlier one may be needed if the last turns out to be damaged."""
        scored = [mark for mark in marks if mark.score is not None]
        kept = {mark.name for mark in marks[-self._keep_last :]} | {
            mark.name for mark in sorted(scored, key=_merit)[-1:]
        }
        for mark in marks:
            if mark.name not in kept:
                gone = f"{UNFINISHED}{mark.name}"
                try:
                    self._disk.rename(mark.name, gone)  # never half a checkpoint under its own name
                except OSError:
                    continue
                shutil.rmtree(self._folder / gone, ignore_errors=True)

    def _read_or_tell(self, mark: Mark) -> Checkpoint | None:
        try:
            return self._read(mark)
        except _Damaged:
            log.warning(
                "The checkpoint of step %d is damaged: it is set aside, and an earlier one is taken.", mark.step
            )
            with suppress(OSError):
                self._disk.rename(mark.name, f"{DAMAGED}{mark.name}")  # so that it takes no good one's place
            return None

    def _read(self, mark: Mark) -> Checkpoint:
        said = self._state(mark.name)
        expected = said["tensors"]
        try:
            data = self._disk.read(f"{mark.name}/{TENSORS}", limit=expected["bytes"])
        except OSError as error:
            raise _Damaged from error
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise _Damaged
        return Checkpoint(mark, said["identity"], RunState(parse_tensors(data), said["numbers"]))

    def _state(self, name: str) -> dict[str, Any]:
        try:
            return _unsealed(self._disk.read(f"{name}/{STATE}", limit=MOST_JSON_BYTES))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _Damaged from error


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Be the only process that trains into a folder; raises RunHeld, CheckpointNotWritten."""
    try:
        file = (folder / LOCK).open("ab")
    except OSError as error:
        raise not_written(f"The folder {folder.name} cannot be locked", error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = "Another process trains into this folder now: wait for it, or choose another folder."
            raise RunHeld(message) from error
        yield


def not_written(what: str, error: OSError) -> CheckpointNotWritten:
    """`what` could not be done, and what to do about it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else os.strerror(error.errno or errno.EIO).lower()
    remedy = "Make room" if full else "Look at the disk"
    return CheckpointNotWritten(
        f"{what}: {reason}. {remedy}, and run the same command again: it goes on from the last checkpoint."
    )


def _merit(mark: Mark) -> tuple[float, int]:
    assert mark.score is not None
    return mark.score, -mark.serial


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _sealed(said: Mapping[str, Any]) -> bytes:
    return json.dumps({"sha256": _digest(said), "checkpoint": said}, indent=1, allow_nan=False).encode()


def _unsealed(data: bytes) -> dict[str, Any]:
    """Raises ValueError, KeyError or TypeError for what `_sealed` did not write."""
    sealed = json.loads(data)
    said: dict[str, Any] = sealed["checkpoint"]
    if sealed["sha256"] != _digest(said) or said["format"] != FORMAT:
        raise ValueError
    return said
