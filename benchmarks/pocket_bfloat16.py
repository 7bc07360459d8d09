"""How often `pocket` answers in bfloat16 what it answers in float32: every shipped task, 500 held-out lines each.

    make art scenes task-files && python benchmarks/pocket_bfloat16.py

Target: 99 % of the answers of a generated text, a label or a closed set. Boxes are compared by overlap as well: a
coordinate one bin away is another token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from promptmux_server.backbone.assemble import assemble
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.engine.offline import ask_all, engine_over
from promptmux_server.engine.request import Answer, Output
from promptmux_server.errors import NoBoxFound
from promptmux_server.pocket import LIBRARY, WEIGHTS
from promptmux_server.pocket.recipes import POCKET_TASKS
from promptmux_server.pocket.scores import WAITING, Line, held_out
from promptmux_server.tasks import BoxOutput, LabelOutput
from promptmux_server.training.metrics import intersection_over_union


def answers(dtype: torch.dtype, asked: Mapping[str, Sequence[Line]]) -> dict[str, list[Output | None]]:
    """Every task's answers to its lines, computed in one element type; None where no box was found."""
    backbone = load_backbone(WEIGHTS)
    model = assemble(backbone, dtype=dtype, packed=True)
    found: dict[str, list[Output | None]] = {}
    with engine_over(LIBRARY, model, backbone.tokenizer(), backbone.fingerprint) as engine:
        for task, lines in asked.items():
            requests = (line.request(task) for line in lines)
            found[task] = [output(future) for future in ask_all(engine, requests, waiting=WAITING)]
    return found


def output(future: Future[Answer]) -> Output | None:
    try:
        return future.result().output
    except NoBoxFound:
        return None


def agreement(task: str, exact: list[Output | None], rounded: list[Output | None]) -> dict[str, object]:
    pairs = list(zip(exact, rounded, strict=True))
    line: dict[str, object] = {"task": task, "lines": len(pairs)}
    line["equal"] = round(sum(said(a) == said(b) for a, b in pairs) / len(pairs), 4)
    overlaps = [
        intersection_over_union(a.box, b.box) for a, b in pairs if isinstance(a, BoxOutput) and isinstance(b, BoxOutput)
    ]
    if overlaps:
        line["overlap_at_least_0.9"] = round(sum(overlap >= 0.9 for overlap in overlaps) / len(overlaps), 4)
    return line


def said(output: Output | None) -> object:
    """What a user reads: of a label, not its probabilities."""
    return output.label if isinstance(output, LabelOutput) else output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=Path, default=Path("var/pocket/tasks"))
    parser.add_argument("--most", type=int, default=500)
    arguments = parser.parse_args()
    asked = {
        name: held_out(arguments.lines / f"{name}.heldout.jsonl", task.kind)[: arguments.most]
        for name, task in POCKET_TASKS.items()
        if (LIBRARY / f"{name}.safetensors").exists()
    }
    exact, rounded = (answers(dtype, asked) for dtype in (torch.float32, torch.bfloat16))
    for task in asked:
        print(json.dumps(agreement(task, exact[task], rounded[task])))


if __name__ == "__main__":
    main()
