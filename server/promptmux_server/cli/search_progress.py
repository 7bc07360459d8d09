"""How a search is seen while it runs: a bar and a line for each trial's end, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from promptmux_server.training.search.record import TrialRecord, best_of
from promptmux_server.training.search.search import Advanced, Ended, Event, Joined, Scored, Search, Stopped

EVERY_S = 10.0
"""Between two lines about steps where nobody watches a terminal."""

Show = Callable[[Event], None]


@contextmanager
def showing(search: Search) -> Iterator[Show]:
    """Yields what is to be told of every event of a search that was just opened."""
    if not sys.stderr.isatty():
        yield _Seen(search, lambda text: typer.echo(text, err=True), _Lines())
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[batch]}  best {task.fields[best]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(search.config.task.name, total=search.config.search.trials, batch="", best="-")
        yield _Seen(search, lambda text: bar.console.print(text, markup=False, highlight=False), _Bar(bar, task))


class _Bar:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def __call__(self, ended: int, batch: str, best: str) -> None:
        self._bar.update(self._task, completed=ended, batch=batch, best=best)


class _Lines:
    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def __call__(self, ended: int, batch: str, best: str) -> None:
        if time.monotonic() - self._last_s >= EVERY_S:
            self._last_s = time.monotonic()
            typer.echo(f"trials ended: {ended}; {batch}; best {best}", err=True)


class _Seen:
    """What has happened so far, in words."""

    def __init__(self, search: Search, say: Callable[[str], None], show: Callable[[int, str, str], None]) -> None:
        self._config, self._say, self._show = search.config, say, show
        self._steps: dict[str, int] = {}
        trials = search.trials()
        self._ended = sum(trial.state != "running" for trial in trials)
        self._best = _best(best_of(trials))

    def __call__(self, event: Event) -> None:
        match event:
            case Joined(trial, step):
                self._steps[trial.name] = step
                begun = f"goes on from step {step}" if step else "begins"
                self._say(f"trial {trial.number} {begun}: {_values(trial)}")
            case Advanced(steps):
                self._steps |= {report.run: report.step for report in steps}
            case Scored(trial, step, score):
                self._say(f"trial {trial.number} step {step}: {score:.4f}")
            case Ended(trial, best):
                self._end(trial, best)
            case Stopped():
                pass
        self._show(self._ended, self._batch(), self._best)

    def _end(self, trial: TrialRecord, best: TrialRecord | None) -> None:
        self._steps.pop(trial.name, None)
        self._ended += 1
        self._say(f"trial {trial.number} {trial.state}" + (f": {trial.reason}" if trial.reason else ""))
        self._best = _best(best)

    def _batch(self) -> str:
        """Who learns now, and between which rungs."""
        marks = [*self._config.rungs, self._config.steps.steps]
        ahead = [next((mark for mark in marks if step < mark), marks[-1]) for step in self._steps.values()]
        to = ", ".join(f"{ahead.count(mark)} to step {mark}" for mark in marks if mark in ahead)
        return f"{len(ahead)} learn" + (f" ({to})" if to else "")


def _best(trial: TrialRecord | None) -> str:
    return "-" if trial is None else f"{trial.score:.4f} (trial {trial.number})"


def _values(trial: TrialRecord) -> str:
    return ", ".join(
        f"{field} {value:.4g}" if isinstance(value, float) else f"{field} {value}"
        for field, value in trial.values.items()
    )
