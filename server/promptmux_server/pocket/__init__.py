"""The embedded default backbone: the scenes it learned from, its pretraining, its weights."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped backbone directory."""

_INSTALLED, _SOURCE = Path(__file__).parent / "library", Path(__file__).parents[3] / "prompts" / "library"
LIBRARY = _INSTALLED if _INSTALLED.is_dir() else _SOURCE
"""The shipped prompts: beside the package in an installed wheel, in prompts/library of a source tree."""
