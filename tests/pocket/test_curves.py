"""The plot of the shipped prompts' learning is drawn from the files beside the recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from promptmux_server.pocket.curves import plot


def write_curve(folder: Path, name: str, steps: int) -> None:
    lines: list[dict[str, object]] = [{"step": step, "nll": 1.0 / step, "tokens": 8} for step in range(1, steps + 1)]
    lines.append({"step": steps, "metric": "accuracy", "value": 0.7, "n": 20})
    (folder / f"{name}.curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"{name}.score.json").write_text(json.dumps({"prompt": {"value": 0.625}}))


@pytest.mark.parametrize("steps", [3, 60], ids=["shorter than a point's mean", "longer"])
def test_every_task_has_a_panel_with_its_score(tmp_path: Path, steps: int) -> None:
    names = ["scene-vqa", "easy-vqa", "a", "b", "c"]
    for name in names:
        write_curve(tmp_path, name, steps)
    png, svg = plot(tmp_path, names)
    assert png.read_bytes().startswith(b"\x89PNG")
    drawn = svg.read_text()
    assert all(f"<!-- {name}  0.625 -->" in drawn for name in names)
    assert "<!-- d  0.625 -->" not in drawn
