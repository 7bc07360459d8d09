"""How the shipped prompts were learned, as one plot: `python -m promptmux_server.pocket.curves`.

Reads what `shipping` left beside the recipes, and writes `curves.png` and `curves.svg` there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from promptmux_server.pocket.recipes import FOLDER, POCKET_TASKS
from promptmux_server.training.search.canvas import BEST, COMPLETE, GRID, QUIET, Panel, figure, plain, save

COLUMNS = 4
SMOOTH = 25
"""Steps that one point of the loss is the mean of."""
SCALES = {"cider": 10.0}
"""The best score of validation, where that is not 1."""


def plot(folder: Path, names: Sequence[str]) -> Sequence[Path]:
    """One panel a task: the loss of its steps, its validation scores, and where its held-out score came to lie."""
    rows = -(-len(names) // COLUMNS)
    made = figure(
        3.6 * COLUMNS,
        2.9 * rows + 0.8,
        "The embedded backbone's prompts, as they were learned",
        "points: validation (captions: CIDEr-D / 10); dashed: held-out lines, through the engine that serves",
    )
    panels = list(made.subplots(rows, COLUMNS, squeeze=False).flat)
    for unused in panels[len(names) :]:
        unused.remove()
    for panel, name in zip(panels, names, strict=False):
        lines = [json.loads(line) for line in (folder / f"{name}.curve.jsonl").read_text().splitlines()]
        final = json.loads((folder / f"{name}.score.json").read_text())["prompt"]
        _panel(plain(panel, f"{name}  {final['value']:.3f}", "step", ""), lines, final["value"])
    return save(made, folder, "curves")


def _panel(axes: Panel, lines: Sequence[dict[str, Any]], final: float) -> None:
    nll = np.array([line["nll"] for line in lines if "nll" in line])
    scores = [(line["step"], line["value"] / SCALES.get(line["metric"], 1.0)) for line in lines if "value" in line]
    width = min(SMOOTH, len(nll))
    smooth = np.convolve(nll, np.ones(width) / width, "valid")
    loss = axes.twinx()
    loss.plot(np.arange(width, len(nll) + 1), smooth, color=QUIET, linewidth=1.0, alpha=0.7)
    loss.set_ylim(0.0, 2.0 * float(np.median(smooth)))
    loss.tick_params(labelsize=8, labelcolor=QUIET, color=GRID, length=3)
    loss.set_ylabel("nll per token", fontsize=8, color=QUIET)
    for spine in loss.spines.values():
        spine.set_visible(False)
    axes.plot(*zip(*scores, strict=True), color=COMPLETE, marker="o", markersize=4, linewidth=1.2)
    axes.axhline(final, color=BEST, linestyle="--", linewidth=1.0)
    axes.set_ylim(0.0, 1.02)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot the learning curves of the shipped prompts.")
    parser.add_argument("--recipes", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    for path in plot(arguments.recipes, list(POCKET_TASKS)):
        print(path)


if __name__ == "__main__":
    main()
