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
from promptmux_server.training.checkpoint import Checkpoint, Checkpoints
from promptmux_server.training.cohort import Cohort
from promptmux_server.training.curve import Curve
from promptmux_server.training.job_config import JobConfig
from promptmux_server.training.job_parts import deep_prompts, described, prompt_of, with_lengths
from promptmux_server.training.material import Material
from promptmux_server.training.metrics import METRICS, Score
from promptmux_server.training.run import Run, StepReport
from promptmux_server.training.validation import OpenBackbone, Scorer

RECIPE = "steps"
"""The topic of an identity that a person may allow to differ: rates and schedule, which fit any state."""


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
        *,
        material: Material | None = None,
        name: str | None = None,
    ) -> None:
        """`material` is what other jobs opened of the same data, and keep open; `name` tells runs of one batch apart.

        Raises TrainingConfigError, DataError, CheckpointNotWritten.
        """
        self.config, self.backbone, self._scorer = config, backbone, scorer
        self._material = material or Material(config, backbone)
        self._owns_material = material is None
        self.data, self.questions = self._material.data, self._material.questions
        self._manifest = with_lengths(self._material.manifest, config.prompt)
        method = deep_prompts(config, backbone)
        self.run = Run(name or config.task.name, method, config.steps, self._material.batches)
        self._checkpoints = Checkpoints(config.output / "checkpoints", keep_last=config.run.keep_checkpoints)
        self._curve = Curve(config.output / "curve.jsonl")
        self._held = ExitStack()

    def __enter__(self) -> Self:
        """Raises RunHeld where another process has this job."""
        self._held.enter_context(self._checkpoints.held())
        if self._owns_material:
            self._held.enter_context(self._material)
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
            advance = cohort.advance()
            for failure in advance.failed:
                raise failure.error
            for report in advance.steps:
                self.record(report)
                yield Stepped(report)
                stopping = stop() and not self.run.finished
                yield from self._keep_what_is_due(report.step, stopping=stopping)
                if stopping:
                    yield Stopped(report.step)
                    return

    def record(self, report: StepReport) -> None:
        """Add a step to the curve."""
        self._curve.add(report)

    def keep(self) -> None:
        """Save the run as it stands; raises CheckpointNotWritten."""
        self._checkpoints.save(self.run.state(), self._identity())

    def keep_scored(self) -> Score:
        """Score the prompt as it stands, and save the run with it; raises CheckpointNotWritten."""
        score = self._scorer(self.backbone, self._prompt(), self.questions)
        self._curve.add_score(self.run.step, score)
        self._checkpoints.save(self.run.state(), self._identity(), score.value)
        return score

    def scores(self) -> dict[int, float]:
        """By step, those of the checkpoints that are kept."""
        return {mark.step: mark.score for mark in self._checkpoints.marks() if mark.score is not None}

    def learned(self) -> Prompt:
        """The prompt of the best score, with where it comes from; raises TrainingError before the run's end."""
        best = self._checkpoints.best()
        if not self.run.finished or best is None or best.mark.score is None:
            raise TrainingError("The run is not at its end: run the same command again, and it goes on.")
        self.run.restore(best.state)
        name = METRICS[self.config.task.kind]
        metric = {"name": name, "value": best.mark.score, "n": len(self.questions)}
        return described(self._prompt(), metric=metric, provenance=self._provenance(best.mark.step))

    def _keep_what_is_due(self, step: int, *, stopping: bool) -> Iterator[Event]:
        if step % self.config.validate_every == 0 or self.run.finished:
            score = self.keep_scored()
            yield Scored(step, score, max(self.scores().values()))
        elif stopping or step % self.config.run.checkpoint_every == 0:
            self.keep()

    def _prompt(self) -> Prompt:
        """What has been learned, as it would be served."""
        return prompt_of(self._manifest, self.run.saved())

    def _identity(self) -> dict[str, Any]:
        return {
            **self._material.identity(),
            "task": hashlib.sha256(self._manifest.to_json().encode()).hexdigest(),
            "prompt": [asdict(self.config.prompt), self.config.begin.text],
            RECIPE: asdict(self.config.steps),
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
            "begun_from": config.begin.text or "noise",
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
