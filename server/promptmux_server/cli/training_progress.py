"""How a training job is seen while it runs: a bar on a terminal, plain lines elsewhere, both on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from promptmux_server.training.job import Event, Scored, Stepped, Stopped

LINES = 20
"""Of steps, over a whole run where nobody watches a terminal."""

PERIOD_S = 600.0
"""Whose steps the time that is left is estimated from: of large backbones a step takes many seconds."""

Show = Callable[[Event], None]


class Pace:
    """Target tokens learned from in a second, smoothed."""

    def __init__(self) -> None:
        self._last_s, self.tokens_per_s = time.monotonic(), 0.0

    def count(self, tokens: int) -> None:
        now_s = time.monotonic()
        pace = tokens / max(now_s - self._last_s, 1e-6)
        self.tokens_per_s = pace if not self.tokens_per_s else 0.9 * self.tokens_per_s + 0.1 * pace
        self._last_s = now_s


@contextmanager
def showing(name: str, begun: int, steps: int) -> Iterator[Show]:
    """Yields what is to be told of every event of a run that stands at step `begun` of `steps`."""
    if not sys.stderr.isatty():
        yield _Lines(name, steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[pace]} tokens/s  best {task.fields[best]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=PERIOD_S) as bar:
        yield _Bar(bar, bar.add_task(name, total=steps, completed=begun, loss="-", pace="-", best="-"))


class _Bar:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task, self._pace = bar, task, Pace()

    def __call__(self, event: Event) -> None:
        match event:
            case Stepped(report):
                self._pace.count(report.tokens)
                pace = f"{self._pace.tokens_per_s:.3g}"
                self._bar.update(self._task, completed=report.step, loss=f"{report.loss:.4f}", pace=pace)
            case Scored(step, score, best):
                self._bar.update(self._task, best=f"{best:.4f}")
                self._bar.console.print(f"step {step}: {score.metric} {score.value:.4f}", markup=False)
            case Stopped():
                pass


class _Lines:
    def __init__(self, name: str, steps: int) -> None:
        self._name, self._steps, self._every, self._pace = name, steps, max(1, steps // LINES), Pace()
        self._begun_s, self._first = time.monotonic(), 0

    def __call__(self, event: Event) -> None:
        match event:
            case Stepped(report):
                self._pace.count(report.tokens)
                self._first = self._first or report.step
                if report.step % self._every == 0 or report.step == self._steps:
                    taken = report.step - self._first + 1
                    left_s = (time.monotonic() - self._begun_s) / taken * (self._steps - report.step)
                    self._say(
                        f"step {report.step} of {self._steps}, loss {report.loss:.4f}, "
                        f"{self._pace.tokens_per_s:.3g} tokens/s, {left_s:.0f} s left"
                    )
            case Scored(step, score, best):
                self._say(f"step {step}, {score.metric} {score.value:.4f} (best {best:.4f}, n = {score.n})")
            case Stopped():
                pass

    def _say(self, text: str) -> None:
        typer.echo(f"{self._name}: {text}", err=True)
