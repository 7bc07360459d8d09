"""All data of one task, opened and checked: the stream that a run learns from, and the samples that it is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from promptmux_server.errors import DataError
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.sketches import pictures_digest
from promptmux_server.training.data.source import SourceConfig, open_source
from promptmux_server.training.data.stream import Stream
from promptmux_server.training.data.survey import Rows, Survey, survey


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which files, and how they are used."""

    train: Sequence[SourceConfig]
    weights: Sequence[float] | None = None
    """Of the files of `train`, in their order; None: each counts by its size."""
    validation: SourceConfig | None = None
    """None: a share of every file of `train` is held out."""
    heldout: float = 0.1
    """That share, of the groups; see `sample.Sample.group`."""
    skip_bad: int = 0
    """Lines of each file that may be left out because they cannot be used."""
    seed: int = 1


@dataclass(frozen=True)
class TaskData:
    """`skipped` lines were left out, of all files together."""

    train: Stream
    validation: Sequence[Rows]
    skipped: int
    pictures: str
    """A digest of the picture files (see `sketches`)."""


def open_task_data(config: DataConfig, encoder: SampleEncoder, cache: Path) -> TaskData:
    """Open and look at all files, before anything is computed; raises DataError."""
    if not config.train or len(config.weights or config.train) != len(config.train):
        raise DataError("Name at least one file to learn from, and one weight for each or none at all.")
    if config.validation is None and not 0.0 < config.heldout < 1.0:
        raise DataError("The share that is held out must be above 0 and below 1, or name a file to score on.")
    found = [_surveyed(source, config, encoder, cache) for source in config.train]
    if config.validation is None:
        train = [each.rows("train", config.heldout) for each in found]
        validation = [each.rows("heldout", config.heldout) for each in found]
    else:
        found.append(_surveyed(config.validation, config, encoder, cache))
        *train, scored = [each.rows() for each in found]
        validation = [scored]
    return TaskData(
        Stream(train, config.seed, config.weights),
        validation,
        skipped=sum(each.bad_count for each in found),
        pictures=pictures_digest([*train, *validation]),
    )


def _surveyed(source: SourceConfig, config: DataConfig, encoder: SampleEncoder, cache: Path) -> Survey:
    manifest = encoder.spec.manifest
    opened = open_source(source, manifest.kind, cache, premise=manifest.takes_premise)
    return survey(opened, encoder, cache, pixels=encoder.spec.takes_image).allow(config.skip_bad)
