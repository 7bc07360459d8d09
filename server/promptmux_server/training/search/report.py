"""What is told of a search when it is over, or while it runs: one value, made of its journal and its trials' curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from promptmux_server.training.curve import Curve, write_durably
from promptmux_server.training.search.record import TrialRecord, best_of
from promptmux_server.training.search.study import Study

REPORT = "report.json"
MOST_POINTS = 200
"""Of a loss curve; each is the mean over its share of the steps."""


@dataclass(frozen=True)
class LossCurve:
    """Training loss by step."""

    step: Sequence[int]
    loss: Sequence[float]


@dataclass(frozen=True)
class Report:
    """A search. `about` says what it is: task, metric, steps, rungs, space."""

    about: Mapping[str, Any]
    trials: Sequence[TrialRecord]
    best: TrialRecord | None
    importances: Mapping[str, float]
    """Shares by field, the largest first."""
    importances_step: int
    """All trials that got so far are compared by their scores there."""
    curves: Mapping[str, LossCurve]
    """By the trial's name."""


def read_report(folder: Path) -> Report:
    """The report of the search whose `output` a folder is; raises TrainingError where it is none."""
    study = Study.read(folder)
    about, trials = study.about, study.trials()
    step = min(about["rungs"], default=about["steps"])
    importances = study.importances(step)
    ordered = dict(sorted(importances.items(), key=lambda item: -item[1]))
    curves = {trial.name: _curve(folder / "trials" / trial.name / "curve.jsonl") for trial in trials}
    return Report(about, trials, best_of(trials), ordered, step, curves)


def write_report(report: Report, folder: Path) -> Path:
    """Write the report as JSON, and say where; raises CheckpointNotWritten."""
    write_durably(folder / REPORT, json.dumps(asdict(report), indent=1, allow_nan=False).encode())
    return folder / REPORT


def _curve(path: Path) -> LossCurve:
    found = Curve(path).losses()
    share = max(1, -(-len(found) // MOST_POINTS))
    parts = [found[start : start + share] for start in range(0, len(found), share)]
    return LossCurve([part[-1][0] for part in parts], [sum(loss for _, loss in part) / len(part) for part in parts])
