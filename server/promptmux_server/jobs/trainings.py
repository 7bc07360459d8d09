"""A training as the table of jobs holds it: written by whoever asks for it, followed by a worker.

Owns the payload's form. Knows neither HTTP nor how a training is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from promptmux_server.jobs.job import Job
from promptmux_server.jobs.table import JobTable
from promptmux_server.training.confinement import confine
from promptmux_server.training.job_config import JobConfig, parse_job

KIND = "training"


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What somebody wants to be trained."""

    config: str
    """The configuration's text."""
    name: str
    """Of its file: for messages, and JSON if it ends so."""
    folder: str
    """Where its relative paths start."""
    task: str
    """That it is for."""
    publish: bool = False
    """Whether the prompt shall be published if it is better than what is served."""
    confined: bool = False
    """Whether all of its paths must lie within `folder`: asked again when the job is begun, since links may change."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The caller's own words."""

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> Self:
        """As it was written, by this version or an earlier one."""
        return cls(**{"task": "", **payload})

    def parsed(self) -> JobConfig:
        """Raises TrainingConfigError."""
        config = parse_job(self.config, self.name, Path(self.folder))
        if self.confined:
            confine(config, Path(self.folder))
        return config


def submit(table: JobTable, request: TrainingRequest, output: Path, **options: Any) -> Job:
    """Queue a training into an output folder that no other job uses; `options` as for `JobTable.submit`."""
    return table.submit(KIND, asdict(request), folder=str(output.resolve()), **options)
