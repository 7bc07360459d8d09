"""The plots of a search: its trials' curves, what mattered, and scores against every field that was searched."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from promptmux_server.training.checkpoint import not_written
from promptmux_server.training.search.canvas import (
    BEST,
    COMPLETE,
    FAILED,
    GRID,
    INK,
    PRUNED,
    QUIET,
    RUNNING,
    figure,
    plain,
    save,
)
from promptmux_server.training.search.record import State, TrialRecord
from promptmux_server.training.search.report import Report

COLOURS: Mapping[State, str] = {"complete": COMPLETE, "pruned": PRUNED, "failed": FAILED, "running": RUNNING}
SMOOTHING = 0.8
"""Of the loss, whose batches differ more than the trials do: the share that a point takes from those before it."""
PLOTS_PER_ROW = 3
SMALL: Mapping[str, Any] = {"fontsize": 8, "color": QUIET}


def draw(report: Report, folder: Path) -> list[Path]:
    """Write every plot that there is something to show in; raises CheckpointNotWritten."""
    makers: dict[str, Callable[[Report], Figure]] = {"curves": curves, "slices": slices}
    if report.importances:
        makers["importances"] = importances
    try:
        return [path for name, make in makers.items() for path in save(make(report), folder, name)]
    except OSError as error:
        raise not_written("The plots cannot be written", error) from error


def curves(report: Report) -> Figure:
    """Loss and score of all trials by step: the pruned ones faded, the best in front."""
    made = figure(11, 4.6, _title(report), _subtitle(report))
    losses, scores = made.subplots(1, 2)
    plain(losses, "Training loss, smoothed", "step", "loss")
    plain(scores, "Held-out score", "step", str(report.about["metric"]))
    for trial in sorted(report.trials, key=lambda trial: (trial == report.best, trial.state == "complete")):
        look = _look(trial, report)
        curve = report.curves[trial.name]
        losses.plot(curve.step, _smooth(curve.loss), **look)
        points = sorted(trial.scores.items())
        scores.plot([step for step, _ in points], [score for _, score in points], marker="o", **look)
    for axes in (losses, scores):
        axes.set_xlim(left=0, right=report.about["steps"] * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for rung in report.about["rungs"]:
            axes.axvline(rung, color=QUIET, linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
            axes.annotate("rung", (rung, 0.0), (3, 3), ("data", "axes fraction"), "offset points", **SMALL)
    scores.margins(y=0.12)
    _name_best(scores, report)
    _legend(made, report)
    return made


def importances(report: Report) -> Figure:
    """How much each field decided."""
    names = list(report.importances)[::-1]
    shares = [report.importances[name] for name in names]
    made = figure(
        7.5,
        1.9 + 0.42 * len(names),
        "What mattered",
        f"PED-ANOVA of the {report.about['metric']} at step {report.importances_step}, of all trials that got so far",
    )
    axes = plain(made.subplots(), "", "share of importance", "")
    axes.barh(names, shares, height=0.62, color=[BEST if share == max(shares) else COMPLETE for share in shares])
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", labelcolor=INK, labelsize=10, length=0)
    axes.set_xlim(0, max(shares) * 1.14)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for place, share in enumerate(shares):
        axes.text(share + max(shares) * 0.015, place, f"{share:.0%}", va="center", fontsize=9.5, color=INK)
    return made


def slices(report: Report) -> Figure:
    """Every trial's highest score against each field; what got further is drawn stronger."""
    space = report.about["space"]
    fields = [name for name in space if len(space[name].get("values", ("low", "high"))) > 1]
    rows = -(-len(fields) // PLOTS_PER_ROW) or 1
    columns = min(len(fields), PLOTS_PER_ROW) or 1
    made = figure(1.2 + 3.5 * columns, 1.3 + 3.1 * rows, _title(report), _subtitle(report))
    for place, name in enumerate(fields):
        axes = made.add_subplot(rows, columns, place + 1)
        plain(axes, name, "", str(report.about["metric"]) if place % columns == 0 else "")
        _slice(axes, report, name, space[name])
    _legend(made, report)
    return made


def _smooth(losses: Sequence[float]) -> list[float]:
    """A moving average that is not drawn to where it begins."""
    found, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1.0
        found.append(total / weight)
    return found


def _slice(axes: Axes, report: Report, name: str, axis: Mapping[str, object]) -> None:
    """Points of one field; a choice has a place for each value, in which points are spread so that all are seen."""
    choices = axis.get("values")
    spread = random.Random(name)
    for trial in sorted(report.trials, key=lambda trial: (trial == report.best, trial.state == "complete")):
        value = trial.values[name]
        if isinstance(choices, Sequence):
            x: float = list(choices).index(value) + spread.uniform(-0.16, 0.16)
        else:
            x = float(value)
        score = 0.0 if trial.state == "failed" else trial.score
        if score is not None:
            axes.scatter(x, score, **_dot(trial, report))
    if isinstance(choices, Sequence):
        axes.set_xticks(range(len(choices)), [str(choice) for choice in choices])
        axes.set_xlim(-0.5, len(choices) - 0.5)
        axes.grid(axis="x", visible=False)
    elif axis["log"]:
        axes.set_xscale("log")
        axes.tick_params(which="minor", color=GRID, length=2)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _look(trial: TrialRecord, report: Report) -> dict[str, Any]:
    """How a trial's line is drawn."""
    if trial == report.best:
        return {"color": BEST, "linewidth": 2.4, "markersize": 5, "zorder": 5}
    if trial.state == "complete":
        return {"color": COMPLETE, "linewidth": 1.5, "markersize": 3.5, "alpha": 0.85, "zorder": 4}
    return {"color": COLOURS[trial.state], "linewidth": 1.0, "markersize": 3, "alpha": 0.75, "zorder": 3}


def _dot(trial: TrialRecord, report: Report) -> dict[str, Any]:
    """How a trial's point is drawn."""
    if trial == report.best:
        return {"color": BEST, "s": 150, "marker": "*", "zorder": 5}
    if trial.state == "failed":
        return {"color": FAILED, "s": 40, "marker": "x", "zorder": 3}
    complete = trial.state == "complete"
    return {"color": COLOURS[trial.state], "s": 44 if complete else 26, "zorder": 4 if complete else 3, "linewidths": 0}


def _name_best(axes: Axes, report: Report) -> None:
    if report.best is not None and report.best.score is not None:
        step = max(step for step, score in report.best.scores.items() if score == report.best.score)
        axes.annotate(
            f"trial {report.best.number}: {report.best.score:.3f}",
            (step, report.best.score),
            xytext=(-6, 7),
            textcoords="offset points",
            ha="right",
            fontsize=9.5,
            fontweight="bold",
            color=BEST,
        )


def _legend(made: Figure, report: Report) -> None:
    states = {trial.state for trial in report.trials if trial != report.best}
    known: list[tuple[str, str]] = [("best", BEST)] if report.best else []
    known += [(state, colour) for state, colour in COLOURS.items() if state in states]
    marks = [Line2D([], [], color=colour, linewidth=0, marker="o", markersize=6, label=name) for name, colour in known]
    made.legend(handles=marks, loc="outside upper right", ncols=len(marks), frameon=False, fontsize=9, labelcolor=QUIET)


def _title(report: Report) -> str:
    return f"{report.about['task']}: {len(report.trials)} trials"


def _subtitle(report: Report) -> str:
    about = report.about
    rungs = ", ".join(map(str, about["rungs"]))
    kept = f"; one of {about['reduction']} went on at step {rungs}" if rungs else ""
    return f"{about['metric']} on {about['n']} held-out samples, {about['at_once']} trials in a batch{kept}"
