"""Many runs that learn in one batch: rows of all of them pass through the backbone together.

A run's rows read its own prompt, its loss is the sum over its own tokens, and what is random comes from its own chance,
so a run learns what it would learn alone. Runs join, leave, finish or fail at any step, and the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from promptmux_server.backbone.model import OFA
from promptmux_server.errors import PromptmuxError, TrainingDiverged, TrainingError
from promptmux_server.training.passes import backward
from promptmux_server.training.recipe import PLAINLY, ComputeRecipe
from promptmux_server.training.run import Part, Run, StepReport


@dataclass(frozen=True)
class Failure:
    """A run that left because of an error of its own."""

    run: Run
    error: PromptmuxError


@dataclass(frozen=True)
class Advance:
    """What one advance did: steps completed, runs that reached their last one, runs that failed."""

    steps: Sequence[StepReport]
    finished: Sequence[Run]
    failed: Sequence[Failure]


class Cohort:
    """The runs that learn now, in the order in which they joined."""

    def __init__(self, compute: ComputeRecipe = PLAINLY) -> None:
        self._compute = compute
        self._runs: dict[str, Run] = {}

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(self._runs.values())

    def join(self, run: Run) -> None:
        """Take a run in, new or resumed; from the next advance on it learns. Raises ValueError for a name in use."""
        if run.name in self._runs:
            raise ValueError("a run of this name is learning already")
        self._runs[run.name] = run

    def leave(self, name: str) -> Run:
        """Take a run out, whole: it can be saved, or join again later."""
        return self._runs.pop(name)

    def advance(self) -> Advance:
        """One batch of every run; who has its recipe's batches takes a step, who is at the end or failed leaves.

        Raises TrainingError where the device has no memory for it: no run can go on then.
        """
        try:
            return self._advance()
        except torch.OutOfMemoryError as error:
            step = 1 + max(run.step for run in self.runs)
            raise TrainingError(
                f"The device has no memory for step {step}: set compute.recompute = true, or compute.rows_per_pass "
                "where many runs learn, and go on; or begin again with fewer run.rows and more steps.accumulation."
            ) from error

    def _advance(self) -> Advance:
        steps: list[StepReport] = []
        failed: list[Failure] = []
        for parts in self._passes(failed):
            for (run, _), loss in zip(parts, backward(parts, self._compute), strict=True):
                try:
                    report = run.absorb(loss)
                except TrainingDiverged as error:
                    failed.append(Failure(run, error))
                    continue
                steps += [report] if report else []
        for failure in failed:
            del self._runs[failure.run.name]
        finished = [run for run in self.runs if run.finished]
        for run in finished:
            del self._runs[run.name]
        return Advance(steps, finished, failed)

    def _passes(self, failed: list[Failure]) -> Iterator[list[tuple[Run, Part]]]:
        """The runs' next batches, divided into passes: one model each, and no more rows than may share one."""
        open_passes: dict[OFA, list[tuple[Run, Part]]] = {}
        for run in self.runs:
            try:
                part = run.take()
            except PromptmuxError as error:
                failed.append(Failure(run, error))
                continue
            waiting = open_passes.setdefault(run.method.model, [])
            if waiting and self._full(waiting, part):
                yield open_passes.pop(run.method.model)
                waiting = open_passes.setdefault(run.method.model, [])
            waiting.append((run, part))
        yield from open_passes.values()

    def _full(self, waiting: Sequence[tuple[Run, Part]], part: Part) -> bool:
        rows = sum(len(other.batch.examples) for _, other in [*waiting, (None, part)])
        return self._compute.rows_per_pass is not None and rows > self._compute.rows_per_pass


def train(run: Run, compute: ComputeRecipe = PLAINLY) -> Iterator[StepReport]:
    """Train one run to its end, step by step. Raises what it failed of."""
    cohort = Cohort(compute)
    cohort.join(run)
    while cohort.runs:
        advance = cohort.advance()
        yield from advance.steps
        for failure in advance.failed:
            raise failure.error
