"""What all runs of one task on one backbone share: data, held-out questions, and pictures that the stem has seen.

Opened and checked once, however many runs learn from it. Knows nothing of what learns but whether it needs pixels.
"""

from __future__ import annotations

from typing import Any, Self

from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.beginning import texts_read
from promptmux_server.training.data.batches import FileBatches
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.task_data import open_task_data
from promptmux_server.training.feature_cache import FeatureCache
from promptmux_server.training.job_config import JobConfig
from promptmux_server.training.job_parts import task_spec
from promptmux_server.training.methods import Method
from promptmux_server.training.ranks import ALONE, Ranks
from promptmux_server.training.recipe import StepRecipe
from promptmux_server.training.run import Run
from promptmux_server.training.seeing import Pixels, Preparation, Stem
from promptmux_server.training.validation import OpenBackbone, exam_of


class Material:
    """Open data, to be used as a context: what the stem has seen is kept at its end."""

    def __init__(self, config: JobConfig, backbone: OpenBackbone, ranks: Ranks = ALONE) -> None:
        """Raises TrainingConfigError, also for what `ranks` of several processes cannot do together, and DataError."""
        _check_divisible(config, ranks.count)
        texts_read(config, backbone)  # data may take minutes, and a search would come to it in the midst
        spec = task_spec(config, backbone)
        self.manifest = spec.manifest
        self._backbone, self._rows, self._ranks = backbone, config.run.rows, ranks
        self._encoder = SampleEncoder(spec, backbone.tokenizer)
        self.data = open_task_data(config.data, self._encoder, config.cache_folder)
        run = config.run
        self.exam = exam_of(self.data.validation, run.validation_samples, config.task.kind, run.metric)
        self._seen = FeatureCache(config.cache_folder / "pictures")
        self._preparation = Preparation.of(spec)

    def __enter__(self) -> Self:
        self._seen.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._seen.__exit__(*exception)

    def start(self, name: str, method: Method, recipe: StepRecipe) -> Run:
        """A run at its beginning, on this process's share of every batch."""
        return self._start(name, method, recipe, self._ranks)

    def start_alone(self, name: str, method: Method, recipe: StepRecipe) -> Run:
        """A run at its beginning, on whole batches, which other processes know nothing of."""
        return self._start(name, method, recipe, ALONE)

    def _start(self, name: str, method: Method, recipe: StepRecipe, ranks: Ranks) -> Run:
        stem: Stem | Pixels
        if method.needs_pixels:
            stem = Pixels(self._preparation)
        else:
            stem = Stem(self._backbone.model, self._backbone.loaded.fingerprint, self._preparation, self._seen)
        batches = FileBatches(
            self.data.train, self._encoder, stem, self._rows, worker=ranks.number, workers=ranks.count
        )
        return Run(name, method, recipe, batches, ranks)

    def identity(self) -> dict[str, Any]:
        """What runs from it have in common, as JSON values by topic."""
        held_out = [rows.source.sha256 for rows in self.data.validation]
        return {
            "backbone": [self._backbone.loaded.fingerprint, str(self._backbone.model.dtype)],
            "data": [self.data.train.digest, self._rows],
            "pictures": self.data.pictures,
            "validation": [held_out, len(self.exam.questions), self.exam.metric],
        }


def _check_divisible(config: JobConfig, processes: int) -> None:
    if config.run.rows < processes:
        raise TrainingConfigError(f"run.rows: {processes} processes need a row each of every batch: give more rows.")
    if processes > 1 and config.steps.drop_worst:
        raise TrainingConfigError(
            "steps.drop_worst: the worst tokens of a batch are found where all of it is: leave it out, or train in one "
            "process."
        )
    if processes > 1 and config.machine.device.startswith("cuda:"):
        raise TrainingConfigError("machine.device: several processes need a device each: say cuda, auto or cpu.")
