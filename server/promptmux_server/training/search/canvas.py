"""How the plots look: colours, type and axes, set on each figure, so that nobody else's figures change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, QUIET, GRID = "#1f2933", "#6b7785", "#e6eaee"
BEST, COMPLETE, RUNNING, PRUNED, FAILED = "#d1495b", "#2a6f97", "#3d9a8b", "#b3bfca", "#e09f3e"
DOTS_PER_INCH = 160
FORMATS = ("png", "svg")

Panel = Axes
"""One coordinate system of a figure, by a name that needs no matplotlib."""


def figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """A figure in inches with its title, to the left as text is read."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.06)
    made = Figure(figsize=(width, height), layout=layout, facecolor="white")
    made.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    made.supxlabel(subtitle, x=0.012, ha="left", fontsize=9, color=QUIET)
    return made


def plain(axes: Axes, title: str, x: str, y: str) -> Axes:
    """Axes with a light grid and no frame."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.set_xlabel(x, fontsize=9.5, color=QUIET)
    axes.set_ylabel(y, fontsize=9.5, color=QUIET)
    axes.tick_params(labelsize=9, labelcolor=QUIET, color=GRID, length=3)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    return axes


def save(made: Figure, folder: Path, name: str) -> Sequence[Path]:
    """Write a figure in every format; raises OSError."""
    paths = [folder / f"{name}.{kind}" for kind in FORMATS]
    for path in paths:
        made.savefig(path, dpi=DOTS_PER_INCH, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
