"""A data file as samples by number, whatever its format.

Owns which format a file is, and puts the file's name and line in front of what a format finds wrong.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

from promptmux_prompts import Kind
from promptmux_server.errors import DataError
from promptmux_server.training.data.coco import CocoFiles, CocoLines, rewritten
from promptmux_server.training.data.jsonl import JsonLines
from promptmux_server.training.data.lines import LineFile
from promptmux_server.training.data.ofa_tsv import COLUMNS, OfaTsv
from promptmux_server.training.data.sample import Defect, Place, Sample

Format = Literal["tsv", "jsonl", "coco"]

SUFFIXES: dict[str, Format] = {".tsv": "tsv", ".jsonl": "jsonl", ".json": "coco"}


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data file, and what has to be said about it."""

    path: Path
    format: Format | None = None
    """None: by the file's suffix."""
    images: Path | None = None
    """Folder of pictures; None: the file's own folder."""
    annotations: Path | None = None
    """The second document of VQA."""
    split: str | None = None
    """See `coco.CocoFiles`, as for `image_name`."""
    image_name: str | None = None


class Reader(Protocol):
    """One format, for one kind of task."""

    identity: str
    """All that decides how a line is read, besides the line."""
    inline: bool
    """Whether pictures lie within the lines, so that the file's digest covers them."""

    def parse(self, line: bytes) -> Sample:
        """Raises Defect."""
        ...


class Source:
    """The samples of one file by number, from 0, in the file's order."""

    def __init__(self, name: str, lines: LineFile, reader: Reader) -> None:
        self.name, self._lines, self._reader = name, lines, reader
        self.sha256 = lines.sha256
        """Of the file, or of the lines that a COCO-style document was rewritten as."""
        self.identity = f"{self.sha256} {reader.identity}"
        """Equal for what gives the same samples, as long as pictures in folders stay what they are."""
        self.inline = reader.inline

    def __len__(self) -> int:
        return len(self._lines)

    def parse(self, number: int) -> Sample:
        """Raises Defect; `sample` names the place."""
        return self._reader.parse(self._lines[number])

    def sample(self, number: int) -> Sample:
        """Raises DataError."""
        try:
            return self.parse(number)
        except Defect as defect:
            raise DataError(f"{self.place(number, defect.entry)}: {defect.reason}.") from defect

    def place(self, number: int, entry: str | None = None) -> Place:
        return Place(self.name, number + 1, entry)


def distinct_targets(source: Source, most: int) -> list[str]:
    """What a source's samples answer, in the order of first appearance; lines that are no samples count for nothing.

    Raises DataError for more than `most`, or none.
    """
    found: dict[str, None] = {}
    for number in range(len(source)):
        with suppress(Defect):
            found[str(source.parse(number).target)] = None
        if len(found) > most:
            raise DataError(f"{source.name} has more than {most} different labels: say which ones the task has.")
    if not found:
        raise DataError(f"{source.name} has no line with a label: check the format, and the kind of the task.")
    return list(found)


def open_source(config: SourceConfig, kind: Kind, cache: Path, *, premise: bool = False) -> Source:
    """Open a data file for tasks of a kind; `cache` is a folder for indices. Raises DataError.

    `premise` says whether the task takes one: OFA's files have it always.
    """
    path, chosen = config.path, config.format or SUFFIXES.get(config.path.suffix.lower())
    if chosen not in get_args(Format):
        raise DataError(f"{path.name}: say its format, one of {', '.join(get_args(Format))}; its suffix does not.")
    images = config.images or path.parent
    if not images.is_dir():
        raise DataError(f"{path.name}: its folder of pictures is not there: check the folder's name.")
    reader: Reader
    if chosen == "coco":
        files = CocoFiles(path, config.annotations, config.split, config.image_name)
        reader, path = CocoLines(kind, images), rewritten(files, kind, cache)
    elif chosen == "jsonl":
        reader = JsonLines(kind, images)
    elif kind in COLUMNS:
        reader = OfaTsv(kind, premise=premise)
    else:
        raise DataError(f"OFA's files hold no {kind}s: write JSON lines (docs/training-data.md).")
    return Source(config.path.name, LineFile(path, cache), reader)
