"""The search: trials learn side by side in one batch; at a rung they are scored, the worse ones end, new ones join.

A trial is a training job as any other, in a folder of its own. All checkpoints are written before the journal says what
follows from them, so that a search which is killed anywhere goes on as if it had not been.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

from promptmux_server.errors import TrainingConfigError, TrainingDiverged, TrainingError
from promptmux_server.training.checkpoint import held_folder, not_written
from promptmux_server.training.cohort import Cohort, Failure
from promptmux_server.training.job import Job
from promptmux_server.training.material import Material
from promptmux_server.training.published import OpenPublished, PublishedFolder
from promptmux_server.training.run import StepReport
from promptmux_server.training.search.config import SearchJobConfig, trial_config
from promptmux_server.training.search.record import State, TrialRecord, best_of
from promptmux_server.training.search.study import Study
from promptmux_server.training.validation import OpenBackbone, Scorer


@dataclass(frozen=True)
class Joined:
    """A trial began, or goes on from `step`."""

    trial: TrialRecord
    step: int


@dataclass(frozen=True)
class Advanced:
    """Every trial of the batch took a step."""

    steps: tuple[StepReport, ...]


@dataclass(frozen=True)
class Scored:
    """A trial was scored at a rung, or at its end."""

    trial: TrialRecord
    step: int
    score: float


@dataclass(frozen=True)
class Ended:
    """A trial is over; `best` is the best that is complete so far."""

    trial: TrialRecord
    best: TrialRecord | None


@dataclass(frozen=True)
class Stopped:
    """Somebody asked the search to stop; it was kept."""


Event = Joined | Advanced | Scored | Ended | Stopped


class Search:
    """An open search, to be used as a context: nobody else may write its folder."""

    def __init__(
        self,
        config: SearchJobConfig,
        backbone: OpenBackbone,
        scorer: Scorer,
        published: OpenPublished = PublishedFolder,
    ) -> None:
        """`published` finds prompts to begin from. Raises TrainingConfigError, DataError."""
        self.config, self.backbone, self._scorer, self._published = config, backbone, scorer, published
        self.material = Material(config, backbone)
        self._jobs: dict[int, Job] = {}
        self._joined: dict[int, int] = {}
        self._failed: dict[int, str] = {}
        self._held = ExitStack()

    def __enter__(self) -> Self:
        """Raises RunHeld where another process has this search, TrainingError where the folder is another search's.

        Raises CheckpointNotWritten too.
        """
        config = self.config
        with ExitStack() as held, _disk_errors_named():
            config.output.mkdir(parents=True, exist_ok=True)
            held.enter_context(held_folder(config.output))
            held.enter_context(self.material)
            self._study = Study.open(config.output, config.search.space, config.search.seed)
            self._study.hold(self._identity(), self._about())
            self._held = held.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def trials(self) -> list[TrialRecord]:
        """All that were drawn so far."""
        return self._study.trials()

    def events(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Search to the last trial's end, or until `stop` says so.

        Raises what no other trial could do better: DataError, CheckpointNotWritten, and TrainingError if all failed.
        """
        with _disk_errors_named():
            yield from self._go_on()
            while True:
                if self._level():
                    yield from self._settle()
                    yield from self._refill()
                if not self._jobs:
                    break
                if stop():
                    self._keep()
                    yield Stopped()
                    return
                yield self._advance()
        self._check_any_complete()

    def job_of(self, trial: TrialRecord) -> Job:
        """A trial as a job, to be resumed where it stands; raises TrainingConfigError."""
        config = trial_config(self.config, trial.number, trial.values)
        return Job(config, self.backbone, self._scorer, self._published, material=self.material, name=trial.name)

    def _go_on(self) -> Iterator[Event]:
        """Take up the trials that had not ended."""
        clock = max((trial.joined + max(trial.scores, default=0) for trial in self.trials()), default=0)
        for trial in self._study.go_on(clock):
            yield from self._join(trial)

    def _refill(self) -> Iterator[Event]:
        """Draw trials until the batch is full, or there have been as many as there may be."""
        clock = self._clock()
        while len(self._jobs) < self.config.search.at_once and len(self.trials()) < self.config.search.trials:
            yield from self._join(self._study.draw(clock))

    def _join(self, trial: TrialRecord) -> Iterator[Event]:
        try:
            job = self.job_of(trial)
        except TrainingConfigError as error:  # values that are allowed, but not together
            yield self._end(trial.number, "failed", reason=error.message)
            return
        step = job.resume()
        self._jobs[trial.number], self._joined[trial.number] = job, trial.joined
        yield Joined(trial, step)

    def _clock_of(self, number: int) -> int:
        return self._joined[number] + self._jobs[number].run.step

    def _clock(self) -> int:
        return max(map(self._clock_of, self._jobs), default=0)

    def _level(self) -> bool:
        """Whether no trial lags behind the others, as some do after a kill between two checkpoints."""
        return len(set(map(self._clock_of, self._jobs))) <= 1

    def _advance(self) -> Event:
        """Those that lag behind, or else all, take a step; who fails of it leaves, and is ended when all is kept."""
        behind = min(map(self._clock_of, self._jobs))
        cohort = Cohort(self.config.compute)
        for number, job in self._jobs.items():
            if self._clock_of(number) == behind:
                cohort.join(job.run)
        steps: list[StepReport] = []
        while cohort.runs and not steps:
            advance = cohort.advance()
            for failure in advance.failed:
                self._leave_failed(failure)
            steps += advance.steps
        for report in steps:
            self._jobs[int(report.run)].record(report)
        return Advanced(tuple(steps))

    def _leave_failed(self, failure: Failure) -> None:
        """Raises what is no fault of the trial's own."""
        if not isinstance(failure.error, TrainingDiverged):
            raise failure.error
        number = int(failure.run.name)
        del self._jobs[number]
        self._failed[number] = failure.error.message

    def _settle(self) -> Iterator[Event]:
        """Score who stands at a rung or its end, keep all, then say in the journal what follows. May be repeated."""
        due = [number for number, job in self._jobs.items() if job.run.finished or job.run.step in self.config.rungs]
        if due or self._failed or self._clock() % self.config.run.checkpoint_every == 0:
            self._keep(due)
        for number in due:
            step = self._jobs[number].run.step
            self._study.report(number, step, self._jobs[number].scores()[step])
        for number in due:
            yield from self._judge(number)
        for number, reason in self._failed.items():
            yield self._end(number, "failed", reason=reason)
        self._failed.clear()

    def _keep(self, due: Sequence[int] = ()) -> None:
        """Checkpoints of all, with scores of those that are due."""
        for number, job in self._jobs.items():
            if number not in due:
                job.keep()
            elif job.run.step not in job.scores():
                job.keep_scored()

    def _judge(self, number: int) -> Iterator[Event]:
        """End a trial that is complete, or not good enough to go on."""
        job = self._jobs[number]
        step = job.run.step
        trial = self._study.trials()[number]
        yield Scored(trial, step, trial.scores[step])
        if job.run.finished:
            yield self._end(number, "complete", score=trial.score)
        elif not self._study.goes_on(number, step, self.config.search.reduction):
            yield self._end(number, "pruned")

    def _end(self, number: int, state: State, *, score: float | None = None, reason: str | None = None) -> Event:
        self._study.end(number, state, score, reason)
        self._jobs.pop(number, None)
        trials = self._study.trials()
        if state != "complete":  # its curve stays, and room for the checkpoints of those that may be best
            shutil.rmtree(self.config.trial_folder / trials[number].name / "checkpoints", ignore_errors=True)
        return Ended(trials[number], best_of(trials))

    def _check_any_complete(self) -> None:
        trials = self._study.trials()
        if best_of(trials) is None:
            reasons = [trial.reason for trial in trials if trial.reason]
            raise TrainingError(f"No trial came to its end. The first that failed: {reasons[0]}")

    def _identity(self) -> dict[str, Any]:
        """What may not change while a search goes on; there may always be more trials."""
        config, search = self.config, self.config.search
        return {
            **self.material.identity(),
            **{section: asdict(getattr(config, section)) for section in ("task", "prompt", "steps")},
            "begin": config.begin.asked,
            "search": [search.at_once, search.reduction, search.seed, config.rungs],
            "space": {field: asdict(axis) for field, axis in search.space.items()},
        }

    def _about(self) -> dict[str, Any]:
        """What reports say of it."""
        config, search = self.config, self.config.search
        return {
            "task": config.task.name,
            "metric": self.material.exam.metric,
            "n": len(self.material.exam.questions),
            "steps": config.steps.steps,
            "rungs": config.rungs,
            "trials": search.trials,
            "at_once": search.at_once,
            "reduction": search.reduction,
            "seed": search.seed,
            "space": {field: asdict(axis) for field, axis in search.space.items()},
        }


@contextmanager
def _disk_errors_named() -> Iterator[None]:
    """Raises CheckpointNotWritten for what Optuna lets through: its journal is the only file written here."""
    try:
        yield
    except OSError as error:
        raise not_written("The journal of the search cannot be written", error) from error
