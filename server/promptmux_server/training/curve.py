"""A run's curve as JSON lines: what every step did, and every score. A run that goes back takes its curve with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from promptmux_prompts.disk import Disk
from promptmux_server.training.checkpoint import not_written
from promptmux_server.training.metrics import Score
from promptmux_server.training.run import StepReport


class Curve:
    """The file of one run."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def go_back(self, step: int) -> None:
        """Forget what lies behind a step, and a last line that was cut off; raises CheckpointNotWritten."""
        kept = []
        with suppress(FileNotFoundError):
            for line in self._path.read_bytes().splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line + b"\n")
        write_durably(self._path, b"".join(kept))

    def losses(self) -> list[tuple[int, float]]:
        """Step and loss, of every step that is written whole; [] where there is no file."""
        found = []
        with suppress(FileNotFoundError):
            for line in self._path.read_bytes().splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    said = json.loads(line)
                    found.append((int(said["step"]), float(said["loss"])))
        return found

    def add(self, report: StepReport) -> None:
        self._append({key: value for key, value in asdict(report).items() if key != "run"})

    def add_score(self, step: int, score: Score) -> None:
        self._append({"step": step, **asdict(score)})

    def _append(self, line: Mapping[str, object]) -> None:
        try:
            with self._path.open("a", encoding="ascii") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise not_written("The curve cannot be written", error) from error


def write_durably(path: Path, data: bytes) -> None:
    """Give a path a content that outlives a power cut, all of it or what was there before.

    Raises CheckpointNotWritten.
    """
    try:
        disk = Disk(path.parent.resolve())
        file, place = disk.create("")
        try:
            disk.write(file, data)
            disk.sync(file)
            disk.rename(place, path.name)
        except OSError:
            disk.unlink(place)
            raise
        finally:
            disk.close(file)
        disk.sync_folder("")
    except OSError as error:
        raise not_written(f"{path.name} cannot be written", error) from error
