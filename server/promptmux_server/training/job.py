"""One training job from its configuration to what it learns: opened, resumed, scored, kept.

Owns the order of things and what makes two runs the same. Who answers the held-out questions is passed in, since
training knows no engine; how progress is shown is for whoever reads the events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch

from promptmux_prompts import Prompt
from promptmux_server.errors import PromptmuxError, TrainingDiverged, TrainingError
from promptmux_server.training.checkpoint import Checkpoint, Checkpoints
from promptmux_server.training.cohort import Cohort
from promptmux_server.training.curve import Curve
from promptmux_server.training.data.batches import FileBatches
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.task_data import open_task_data
from promptmux_server.training.feature_cache import FeatureCache
from promptmux_server.training.job_config import JobConfig
from promptmux_server.training.job_parts import method_of, prompt_of, task_spec
from promptmux_server.training.methods import trainable
from promptmux_server.training.metrics import Score
from promptmux_server.training.run import Run, StepReport
from promptmux_server.training.seeing import Pixels, Preparation, Stem
from promptmux_server.training.validation import OpenBackbone, Scorer, exam_of
from promptmux_server.training.weights_delta import WeightsDelta

RECIPE = "steps"
"""The topic of an identity that a person may allow to differ: rates and schedule, which fit any state."""


@dataclass(frozen=True)
class Stepped:
    """A step was taken."""

    report: StepReport


@dataclass(frozen=True)
class Scored:
    """What was learned up to a step was scored; `best` is the highest score so far, this one included."""

    step: int
    score: Score
    best: float


@dataclass(frozen=True)
class Stopped:
    """Somebody asked the run to stop; it was kept, and goes on from here."""

    step: int


Event = Stepped | Scored | Stopped

Learned = Prompt | WeightsDelta
"""What a job makes: a prompt, or trained weights of a baseline."""


class Job:
    """An open job, to be used as a context: its data are checked, and nobody else may write its checkpoints."""

    def __init__(self, config: JobConfig, backbone: OpenBackbone, scorer: Scorer) -> None:
        """Raises TrainingConfigError, DataError, CheckpointNotWritten."""
        self.config, self.backbone, self._scorer = config, backbone, scorer
        spec = task_spec(config, backbone)
        self._manifest = spec.manifest
        encoder = SampleEncoder(spec, backbone.tokenizer)
        self.data = open_task_data(config.data, encoder, config.cache_folder)
        run = config.run
        self.exam = exam_of(self.data.validation, run.validation_samples, config.task.kind, run.metric)
        self._seen = FeatureCache(config.cache_folder / "pictures")
        self.method = method_of(config, backbone)
        stem: Stem | Pixels
        if self.method.needs_pixels:
            stem = Pixels(Preparation.of(spec))
        else:
            stem = Stem(backbone.model, backbone.loaded.fingerprint, Preparation.of(spec), self._seen)
        batches = FileBatches(self.data.train, encoder, stem, run.rows)
        self.run = Run(config.task.name, self.method, config.steps, batches)
        self._identity = self._what_it_is()
        self._checkpoints = Checkpoints(config.output / "checkpoints", keep_last=run.keep_checkpoints)
        self._curve = Curve(config.output / "curve.jsonl")
        self._held = ExitStack()

    def __enter__(self) -> Self:
        """Raises RunHeld where another process has this job."""
        self._held.enter_context(self._checkpoints.held())
        self._held.enter_context(self._seen)
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def resume(self, *, changed_recipe: bool = False) -> int:
        """Stand where the last good checkpoint does, or at the beginning; answers the step.

        `changed_recipe` allows one of another step recipe. Raises TrainingError for a checkpoint of another run.
        """
        found = self._checkpoints.newest()
        if found is not None:
            self._check_same_run(found, RECIPE if changed_recipe else None)
            self.run.restore(found.state)
        self._curve.go_back(self.run.step)
        return self.run.step

    def events(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Learn to the last step, or until `stop` says so. Raises what the run fails of; what was kept stays."""
        cohort = Cohort(self.config.compute)
        if not self.run.finished:
            cohort.join(self.run)
        while cohort.runs:
            try:
                advance = cohort.advance()
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"The device has no memory for step {self.run.step + 1}: set compute.recompute = true and go on, "
                    "or begin again with fewer run.rows and more steps.accumulation."
                ) from error
            for failure in advance.failed:
                raise self._told(failure.error)
            for report in advance.steps:
                self._curve.add(report)
                yield Stepped(report)
                stopping = stop() and not self.run.finished
                yield from self._keep(report.step, stopping=stopping)
                if stopping:
                    yield Stopped(report.step)
                    return

    def learned(self) -> Learned:
        """What had the best score, with where it comes from; raises TrainingError before the run's end."""
        best = self._checkpoints.best()
        if not self.run.finished or best is None or best.mark.score is None:
            raise TrainingError("The run is not at its end: run the same command again, and it goes on.")
        self.run.restore(best.state)
        metric = {"name": self.exam.metric, "value": best.mark.score, "n": len(self.exam.questions)}
        manifest = replace(self._manifest, metric=metric, provenance=self._provenance(best.mark.step))
        method = self.config.method
        if method.name == "prompt":
            return prompt_of(manifest, self.run.saved())
        return WeightsDelta(method.name, method.width, manifest, self.run.saved())

    def _keep(self, step: int, *, stopping: bool) -> Iterator[Event]:
        """Score and save what is due behind a step."""
        score = None
        if step % self.config.validate_every == 0 or self.run.finished:
            score = self._score()
            self._curve.add_score(step, score)
        if score is not None or stopping or step % self.config.run.checkpoint_every == 0:
            self._checkpoints.save(self.run.state(), self._identity, None if score is None else score.value)
        if score is not None:
            yield Scored(step, score, max(mark.score for mark in self._checkpoints.marks() if mark.score is not None))

    def _score(self) -> Score:
        adapted = replace(self.backbone, model=self.method.adapted(self.run.values()))
        return self._scorer(adapted, self._prompt(), self.exam)

    def _prompt(self) -> Prompt:
        """What has been learned, as it would be served; of length 0 where weights learn."""
        return prompt_of(self._manifest, self.run.saved())

    def _told(self, error: PromptmuxError) -> PromptmuxError:
        """An error that a run failed of, with the checkpoint that stands, where somebody has to go back to one."""
        if not isinstance(error, TrainingDiverged):
            return error
        marks = self._checkpoints.marks()
        return TrainingDiverged(error.run, error.step, error.what, marks[-1].name if marks else None)

    def _what_it_is(self) -> dict[str, Any]:
        config, held_out = self.config, self.data.validation
        return {
            "backbone": [self.backbone.loaded.fingerprint, str(self.backbone.model.dtype)],
            "task": hashlib.sha256(self._manifest.to_json().encode()).hexdigest(),
            "data": [self.data.train.digest, config.run.rows],
            "pictures": self.data.pictures,
            "validation": [[rows.source.sha256 for rows in held_out], len(self.exam.questions), self.exam.metric],
            "method": asdict(config.method),
            "prompt": [asdict(config.prompt), config.begin.text],
            RECIPE: asdict(config.steps),
        }

    def _check_same_run(self, found: Checkpoint, allowed: str | None) -> None:
        expected = self._identity
        differing = [topic for topic in expected if found.identity.get(topic) != expected[topic] and topic != allowed]
        if not differing:
            return
        other = "" if differing != [RECIPE] else ", or say --changed-recipe to go on with the new one"
        raise TrainingError(
            f"The checkpoints in this output folder are of another run: its {', '.join(differing)} differ. Put back "
            f"what the run began with, or choose another folder as `output`{other}."
        )

    def _provenance(self, step: int) -> dict[str, Any]:
        """Where what was learned came from, as its manifest tells it."""
        config, steps = self.config, self.config.steps
        prompt = {"generator": config.prompt.generator, "begun_from": config.begin.text or "noise"}
        return {
            "method": config.method.name,
            **(prompt if config.method.name == "prompt" else {}),
            "trainable": trainable(self.method),
            "data": [rows.source.sha256 for rows in self.data.train.sources],
            "stream": self.data.train.digest,
            "samples": self.data.train.epoch_samples,
            "rows": config.run.rows * steps.accumulation,
            "steps": steps.steps,
            "chosen_step": step,
            "learning_rate": steps.learning_rate,
            "weight_decay": steps.weight_decay,
            "smoothing": steps.smoothing,
            "seed": steps.seed,
        }
