"""Which candidate of a configuration list is fastest here: timed once per shape class, remembered on disk.

A record decides which code runs, so it is read from and written to a directory that nobody but its owner can write.
Knows nothing of the ops: it is handed calls and a timer.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import stat
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from promptmux_kernels.triton_ops import configs
from promptmux_kernels.triton_ops.configs import Config, ShapeClass

log = logging.getLogger(__name__)

Call = Callable[[], object]
Timer = Callable[[Call], float]
"""Makes the call, several times if it likes, and says how long one takes; in any unit, so long as it is the same."""

REPEATS = 20
L2_BYTES = 256 << 20
"""Written between timed calls so that each reads its inputs from memory: more than any L2 cache in use."""


class UnsafeDirectory(PermissionError):
    """Somebody else could put a record of theirs in place of ours."""


def tune(calls: Mapping[ShapeClass, Call], where: str, directory: Path, device_name: str, timer: Timer) -> None:
    """Prefer the fastest candidate for each shape from now on; shapes on record are not timed again."""
    record = _Record(directory, device_name)
    known = record.read(where, calls)
    missing = [shape for shape in calls if shape not in known]
    found = {shape: _fastest(calls[shape], configs.candidates(where, shape), timer) for shape in missing}
    if found:
        record.add(found)
    configs.prefer(where, known | found)


def _fastest(call: Call, candidates: tuple[Config, ...], timer: Timer) -> Config:
    def took(config: Config) -> float:
        """How long the call takes; for ever where the device has no room for it or the compiler gives up."""
        try:
            with configs.forced(config):
                return timer(call)
        except TritonError as error:
            log.warning("kernel configuration passed over: %s: %s", config, error)
            return math.inf

    return candidates[0] if len(candidates) == 1 else min(candidates, key=took)


def gpu_milliseconds(call: Call) -> float:
    """Median time of one call between two CUDA events, caches cold; the first call compiles and is not timed."""
    call()
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


class _Record:
    """One JSON file per device model and compiler version."""

    def __init__(self, directory: Path, device_name: str) -> None:
        own_directory(directory)
        name = "".join(c if c.isalnum() else "-" for c in f"{device_name}-triton-{triton.__version__}")
        self._file = directory / f"{name}.json"

    def read(self, where: str, wanted: Mapping[ShapeClass, Call]) -> dict[ShapeClass, Config]:
        """The winners on record that are still candidates."""
        entries = self._entries()
        return {
            shape: config
            for shape in wanted
            for config in configs.candidates(where, shape)
            if dataclasses.asdict(config) == entries.get(_key(shape))
        }

    def add(self, winners: Mapping[ShapeClass, Config]) -> None:
        entries = self._entries() | {_key(shape): dataclasses.asdict(config) for shape, config in winners.items()}
        with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False, encoding="utf-8") as file:
            json.dump(entries, file, indent=1, sort_keys=True)
        os.replace(file.name, self._file)

    def _entries(self) -> dict[str, Any]:
        if not self._file.exists():
            return {}
        try:
            found: dict[str, Any] = dict(json.loads(self._file.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            log.warning("%s cannot be read: kernels are tuned anew", self._file)
            return {}
        return found


def _key(shape: ShapeClass) -> str:
    return f"{shape.op} {shape.head_dim} {shape.element} {'long' if shape.long else 'short'}"


def own_directory(directory: Path) -> None:
    """Make the directory if there is none; refuse one that anybody else could write to."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.getuid():
        raise UnsafeDirectory(f"{directory} belongs to user {found.st_uid}, not to {os.getuid()}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeDirectory(f"{directory} can be written by others: chmod go-w it, or name another directory")
