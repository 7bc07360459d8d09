"""Files that lie beside the repository, not in it; a test that needs them is skipped where they are absent."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def golden_dir() -> Path:
    """Outputs of the released model."""
    return _there(SHARED / "golden", "the released model's golden files")


def ofa_bpe_dir() -> Path:
    """The released BPE tables."""
    return _there(SHARED / "data" / "ofa-bpe", "OFA's BPE tables")


def _there(path: Path, what: str) -> Path:
    if not path.is_dir():
        pytest.skip(f"{what} are not beside this repository ({path.relative_to(ROOT.parent)})")
    return path
