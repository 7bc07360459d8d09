"""One training job from its configuration to a prompt: opened, resumed, scored, kept.

Owns the order of things and what makes two runs the same. Who answers the held-out questions is passed in, since
training knows no engine; how progress is shown is for whoever reads the events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Self

from promptmux_prompts import Prompt
from promptmux_server.errors import TrainingError
from promptmux_server.training.beginning import beginning
from promptmux_server.training.checkpoint import Checkpoint, Checkpoints
from promptmux_server.training.cohort import Cohort
from promptmux_server.training.curve import Curve
from promptmux_server.training.initial import FROM_NOISE
from promptmux_server.training.job_config import JobConfig
from promptmux_server.training.job_parts import described, open_material, prompt_of
from promptmux_server.training.metrics import METRICS, Score
from promptmux_server.training.published import OpenPublished, PublishedFolder
from promptmux_server.training.ranks import ALONE, Ranks
from promptmux_server.training.run import StepReport
from promptmux_server.training.shared import share_state
from promptmux_server.training.validation import OpenBackbone, Scorer, questions_of

RECIPE = "steps"
"""The topic of an identity that a person may allow to differ: rates and schedule, which fit any state."""
BEGUN_FROM = "begun_from"
"""Kept with an identity, and not compared: what was found once is not looked for again, for it may have changed."""


@dataclass(frozen=True)
class Stepped:
    """A step was taken."""

    report: StepReport


@dataclass(frozen=True)
class Scored:
    """The prompt as it is behind a step was scored; `best` is the highest score so far, this one included."""

    step: int
    score: Score
    best: float


@dataclass(frozen=True)
class Stopped:
    """Somebody asked the run to stop; it was kept, and goes on from here."""

    step: int


Event = Stepped | Scored | Stopped


class Job:
    """An open job, to be used as a context: its data are checked, and nobody else may write its checkpoints."""

    def __init__(
        self,
        config: JobConfig,
        backbone: OpenBackbone,
        scorer: Scorer,
        published: OpenPublished = PublishedFolder,
        ranks: Ranks = ALONE,
    ) -> None:
        """`published` finds prompts to begin from; of several `ranks` this one must lead, and the others `follow`.

        Raises TrainingConfigError, DataError, CheckpointNotWritten.
        """
        self.config, self.backbone, self._scorer, self._published = config, backbone, scorer, published
        self._ranks = ranks
        self._material = open_material(config, backbone, ranks)
        self._manifest, self.data = self._material.spec.manifest, self._material.data
        self.questions = questions_of(self.data.validation, config.run.validation_samples)
        self.run = self._material.start(config.task.name, FROM_NOISE, config.steps, ranks)
        self._begun_from: Any = None
        self._checkpoints = Checkpoints(config.output / "checkpoints", keep_last=config.run.keep_checkpoints)
        self._curve = Curve(config.output / "curve.jsonl")
        self._held = ExitStack()

    def __enter__(self) -> Self:
        """Raises RunHeld where another process has this job."""
        self._held.enter_context(self._checkpoints.held())
        self._held.enter_context(self._material.seen)
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def resume(self, *, changed_recipe: bool = False) -> int:
        """Stand where the last good checkpoint does, or at the beginning; answers the step.

        `changed_recipe` allows one of another step recipe. Raises TrainingError for a checkpoint of another run,
        TrainingConfigError for a beginning that cannot be had.
        """
        found = self._checkpoints.newest()
        if found is not None:
            self._check_same_run(found, RECIPE if changed_recipe else None)
            self.run.restore(found.state)
            self._begun_from = found.identity[BEGUN_FROM]
        else:
            first = beginning(self.config, self.backbone, self._published, self._material.start)
            self.run = self._material.start(self.config.task.name, first.tables, self.config.steps, self._ranks)
            self._begun_from = first.told
        self._curve.go_back(self.run.step)
        return self.run.step

    def events(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Learn to the last step, or until `stop` says so. Raises what the run fails of; what was kept stays."""
        share_state(self._ranks, self.run.state())
        cohort = Cohort(self.config.compute)
        if not self.run.finished:
            cohort.join(self.run)
        while cohort.runs:
            advance = cohort.advance()
            for failure in advance.failed:
                raise failure.error
            for report in advance.steps:
                self._curve.add(report)
                yield Stepped(report)
                stopping = self._ranks.agree(stop()) and not self.run.finished
                yield from self._keep(report.step, stopping=stopping)
                if stopping:
                    self._ranks.agree(True)  # whoever ended earlier might have the others ended by what started them
                    yield Stopped(report.step)
                    return

    def learned(self) -> Prompt:
        """The prompt of the best score, with where it comes from; raises TrainingError before the run's end."""
        best = self._checkpoints.best()
        if not self.run.finished or best is None or best.mark.score is None:
            raise TrainingError("The run is not at its end: run the same command again, and it goes on.")
        self.run.restore(best.state)
        name = METRICS[self.config.task.kind]
        metric = {"name": name, "value": best.mark.score, "n": len(self.questions)}
        return described(self._prompt(), metric=metric, provenance=self._provenance(best.mark.step))

    def _keep(self, step: int, *, stopping: bool) -> Iterator[Event]:
        """Score and save what is due behind a step."""
        score = None
        if step % self.config.validate_every == 0 or self.run.finished:
            score = self._scorer(self.backbone, self._prompt(), self.questions)
            self._curve.add_score(step, score)
        if score is not None or stopping or step % self.config.run.checkpoint_every == 0:
            identity = {**self._identity(), BEGUN_FROM: self._begun_from}
            self._checkpoints.save(self.run.state(), identity, None if score is None else score.value)
        if score is not None:
            yield Scored(step, score, max(mark.score for mark in self._checkpoints.marks() if mark.score is not None))

    def _prompt(self) -> Prompt:
        """What has been learned, as it would be served."""
        return prompt_of(self._manifest, self.run.saved())

    def _identity(self) -> dict[str, Any]:
        config, held_out = self.config, self.data.validation
        return {
            "backbone": [self.backbone.loaded.fingerprint, str(self.backbone.model.dtype)],
            "task": hashlib.sha256(self._manifest.to_json().encode()).hexdigest(),
            "data": [self.data.train.digest, config.run.rows],
            "validation": [[rows.source.sha256 for rows in held_out], len(self.questions)],
            "prompt": [asdict(config.prompt), config.begin.asked],
            RECIPE: asdict(config.steps),
        }

    def _check_same_run(self, found: Checkpoint, allowed: str | None) -> None:
        expected = self._identity()
        differing = [topic for topic in expected if found.identity.get(topic) != expected[topic] and topic != allowed]
        if not differing:
            return
        other = "" if differing != [RECIPE] else ", or say --changed-recipe to go on with the new one"
        raise TrainingError(
            f"The checkpoints in this output folder are of another run: its {', '.join(differing)} differ. Put back "
            f"what the run began with, or choose another folder as `output`{other}."
        )

    def _provenance(self, step: int) -> dict[str, Any]:
        """Where the prompt came from, as its manifest tells it."""
        config, steps = self.config, self.config.steps
        return {
            "method": "prompt",
            "generator": config.prompt.generator,
            BEGUN_FROM: self._begun_from,
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
