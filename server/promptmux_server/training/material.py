"""What all runs of one task on one backbone share: data, held-out questions, and pictures that the stem has seen.

Opened and checked once, however many runs learn from it. Knows no run, and nothing of what a prompt looks like.
"""

from __future__ import annotations

from typing import Any, Self

from promptmux_server.training.data.batches import FileBatches
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.task_data import open_task_data
from promptmux_server.training.feature_cache import FeatureCache
from promptmux_server.training.job_config import JobConfig
from promptmux_server.training.job_parts import task_spec
from promptmux_server.training.seeing import Preparation, Stem
from promptmux_server.training.validation import OpenBackbone, questions_of


class Material:
    """Open data, to be used as a context: what the stem has seen is kept at its end."""

    def __init__(self, config: JobConfig, backbone: OpenBackbone) -> None:
        """Raises TrainingConfigError, DataError."""
        spec = task_spec(config, backbone)
        self.manifest = spec.manifest
        self._backbone, self._rows = backbone, config.run.rows
        encoder = SampleEncoder(spec, backbone.tokenizer)
        self.data = open_task_data(config.data, encoder, config.cache_folder)
        self.questions = questions_of(self.data.validation, config.run.validation_samples)
        self._seen = FeatureCache(config.cache_folder / "pictures")
        stem = Stem(backbone.model, backbone.loaded.fingerprint, Preparation.of(spec), self._seen)
        self.batches = FileBatches(self.data.train, encoder, stem, config.run.rows)
        """Of any run: they have no place of their own."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._seen.__exit__(*exception)

    def identity(self) -> dict[str, Any]:
        """What runs from it have in common, as JSON values by topic."""
        return {
            "backbone": [self._backbone.loaded.fingerprint, str(self._backbone.model.dtype)],
            "data": [self.data.train.digest, self._rows],
            "validation": [[rows.source.sha256 for rows in self.data.validation], len(self.questions)],
        }
