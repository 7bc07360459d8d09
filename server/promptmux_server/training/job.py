"""One training job from its configuration to what it learns: opened, resumed, scored, kept.

Owns the order of things and what makes two runs the same. Who answers the held-out questions is passed in, since
training knows no engine; how progress is shown is for whoever reads the events.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from promptmux_prompts import Prompt
from promptmux_server.errors import PromptmuxError, TrainingDiverged, TrainingError
from promptmux_server.training.beginning import beginning
from promptmux_server.training.checkpoint import Checkpoint, Checkpoints
from promptmux_server.training.cohort import Cohort
from promptmux_server.training.curve import Curve
from promptmux_server.training.initial import Begin
from promptmux_server.training.job_config import JobConfig
from promptmux_server.training.job_parts import method_of, prompt_of, with_prompt
from promptmux_server.training.material import Material
from promptmux_server.training.methods import Method, trainable
from promptmux_server.training.metrics import Score
from promptmux_server.training.published import OpenPublished, PublishedFolder
from promptmux_server.training.ranks import ALONE, Ranks
from promptmux_server.training.recipe import StepRecipe
from promptmux_server.training.run import Run, StepReport
from promptmux_server.training.shared import share_state
from promptmux_server.training.validation import OpenBackbone, Scorer
from promptmux_server.training.weights_delta import WeightsDelta

RECIPE, PICTURES = "steps", "pictures"
MAY_DIFFER = {RECIPE: "--changed-recipe", PICTURES: "--changed-pictures"}
"""Topics of an identity that a person may allow to differ: rates and schedule fit any state, and other pictures under
the same names leave every line in its place."""
BEGUN_FROM = "begun_from"
"""Kept with an identity, and not compared: what was found once is not looked for again, for it may have changed."""


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


def held(config: JobConfig) -> AbstractContextManager[None]:
    """Be the only one who trains into a job's folder, from before anything large is opened to the end of its `Job`.

    Raises CheckpointNotWritten; entering it raises RunHeld where another process has the folder.
    """
    return _checkpoints(config).held()


class Job:
    """An open job, to be used as a context: its data are checked. Its folder is `held` by who opens it."""

    def __init__(
        self,
        config: JobConfig,
        backbone: OpenBackbone,
        scorer: Scorer,
        published: OpenPublished = PublishedFolder,
        ranks: Ranks = ALONE,
        *,
        material: Material | None = None,
        name: str | None = None,
    ) -> None:
        """`published` finds prompts to begin from; of several `ranks` this one must lead, and the others `follow`.

        `material` is what other jobs opened of the same data, and keep open; `name` tells runs of one batch apart.
        Raises TrainingConfigError, DataError, CheckpointNotWritten.
        """
        self.config, self.backbone, self._scorer, self._published = config, backbone, scorer, published
        self._ranks = ranks
        self._material = material or Material(config, backbone, ranks)
        self._owns_material = material is None
        self.data, self.exam = self._material.data, self._material.exam
        self._manifest = with_prompt(self._material.manifest, config, backbone.loaded.config)
        self.run = self._material.start(name or config.task.name, method_of(config, backbone), config.steps)
        self._begun_from: Any = None
        self._identity = self._what_it_is()
        self._checkpoints = _checkpoints(config)
        self._curve = Curve(config.output / "curve.jsonl")

    def __enter__(self) -> Self:
        if self._owns_material:
            self._material.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._owns_material:
            self._material.__exit__(*exception)

    @property
    def method(self) -> Method:
        """What learns."""
        return self.run.method

    def resume(self, *, changed_recipe: bool = False, changed_pictures: bool = False) -> int:
        """Stand where the last good checkpoint does, or at the beginning; answers the step.

        `changed_recipe` allows one of another step recipe, `changed_pictures` one of other picture files under the same
        names. Raises TrainingError for a checkpoint of another run, TrainingConfigError for a beginning that cannot be
        had.
        """
        found = self._checkpoints.newest()
        if found is not None:
            allowed = [topic for topic, may in ((RECIPE, changed_recipe), (PICTURES, changed_pictures)) if may]
            self._check_same_run(found, allowed)
            self.run.restore(found.state)
            self._begun_from = found.identity[BEGUN_FROM]
        elif self.config.method.name == "prompt":
            self._begin()
        self._curve.go_back(self.run.step)
        return self.run.step

    def events(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Learn to the last step, or until `stop` says so. Raises what the run fails of; what was kept stays."""
        share_state(self._ranks, self.run.state())
        cohort = Cohort(self.config.compute)
        if not self.run.finished:
            cohort.join(self.run)
        elif self.run.step not in self.scores():  # the recipe has fewer steps than were taken
            yield self._scored()
        while cohort.runs:
            advance = cohort.advance()
            for failure in advance.failed:
                raise self._told(failure.error)
            for report in advance.steps:
                self.record(report)
                yield Stepped(report)
                stopping = self._ranks.agree(stop()) and not self.run.finished
                yield from self._keep_what_is_due(report.step, stopping=stopping)
                if stopping:
                    self._ranks.agree(True)  # whoever ended earlier might have the others ended by what started them
                    yield Stopped(report.step)
                    return

    def record(self, report: StepReport) -> None:
        """Add a step to the curve."""
        self._curve.add(report)

    def keep(self) -> None:
        """Save the run as it stands; raises CheckpointNotWritten."""
        self._save(None)

    def keep_scored(self) -> Score:
        """Score what is learned as it stands, and save the run with it; raises CheckpointNotWritten."""
        score = self._score()
        self._curve.add_score(self.run.step, score)
        self._save(score.value)
        return score

    def scores(self) -> dict[int, float]:
        """By step, those of the checkpoints that are kept."""
        return {mark.step: mark.score for mark in self._checkpoints.marks() if mark.score is not None}

    def learned(self, **origin: Any) -> Learned:
        """What had the best score, with where it comes from, which `origin` adds to.

        Raises TrainingError before the run's end.
        """
        best = self._checkpoints.best()
        if not self.run.finished or best is None or best.mark.score is None:
            raise TrainingError("The run is not at its end: run the same command again, and it goes on.")
        values = {name: value.to(self.backbone.model.device) for name, value in best.state.values().items()}
        tensors = self.method.saved(values)
        metric = {"name": self.exam.metric, "value": best.mark.score, "n": len(self.exam.questions)}
        manifest = replace(self._manifest, metric=metric, provenance={**self._provenance(best.mark.step), **origin})
        method = self.config.method
        if method.name == "prompt":
            return prompt_of(manifest, tensors)
        return WeightsDelta(method.name, method.width, manifest, tensors)

    def _begin(self) -> None:
        """Put the run where `[begin]` says."""

        def probe(name: str, begin: Begin, recipe: StepRecipe) -> Run:
            return self._material.start_alone(name, method_of(self.config, self.backbone, begin), recipe)

        first = beginning(self.config, self.backbone, self._published, probe)
        method = method_of(self.config, self.backbone, first.tables)
        self.run = self._material.start(self.run.name, method, self.config.steps)
        self._begun_from = first.told

    def _keep_what_is_due(self, step: int, *, stopping: bool) -> Iterator[Event]:
        if step % self.config.validate_every == 0 or self.run.finished:
            yield self._scored()
        elif stopping or step % self.config.run.checkpoint_every == 0:
            self.keep()

    def _scored(self) -> Scored:
        score = self.keep_scored()
        return Scored(self.run.step, score, max(self.scores().values()))

    def _save(self, score: float | None) -> None:
        self._checkpoints.save(self.run.state(), {**self._identity, BEGUN_FROM: self._begun_from}, score)

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
        config = self.config
        return {
            **self._material.identity(),
            "task": hashlib.sha256(self._manifest.to_json().encode()).hexdigest(),
            "method": asdict(config.method),
            "prompt": [asdict(config.prompt), config.begin.asked],
            RECIPE: asdict(config.steps),
        }

    def _check_same_run(self, found: Checkpoint, allowed: Collection[str]) -> None:
        expected = json.loads(json.dumps(self._identity))  # as a checkpoint gives it back: lists where tuples were
        differing = [topic for topic in expected if found.identity.get(topic) != expected[topic]]
        differing = [topic for topic in differing if topic not in allowed]
        if not differing:
            return
        options = " ".join(MAY_DIFFER.get(topic, "") for topic in differing)
        other = f", or say {options} to go on with what is new" if MAY_DIFFER.keys() >= set(differing) else ""
        raise TrainingError(
            f"The checkpoints in this output folder are of another run: its {', '.join(differing)} differ. Put back "
            f"what the run began with, or choose another folder as `output`{other}."
        )

    def _provenance(self, step: int) -> dict[str, Any]:
        """Where what was learned came from, as its manifest tells it."""
        config, steps = self.config, self.config.steps
        prompt = {"generator": config.prompt.generator, BEGUN_FROM: self._begun_from}
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


def _checkpoints(config: JobConfig) -> Checkpoints:
    return Checkpoints(config.output / "checkpoints", keep_last=config.run.keep_checkpoints)
