"""How often `pocket` answers in bfloat16 what it answers in float32: four tasks, 500 held-out pictures each.

    make art scenes && python benchmarks/pocket_bfloat16.py

Target: 99 % of the answers of a generated text, a label or a closed set. Boxes are compared by overlap as well: a
coordinate one bin away is another token.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import Future
from pathlib import Path

import torch

from promptmux_server.backbone.assemble import assemble
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.engine.offline import engine_over
from promptmux_server.engine.request import Answer, Output
from promptmux_server.errors import NoBoxFound
from promptmux_server.pocket import LIBRARY, WEIGHTS
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.samples import TASKS, TaskName
from promptmux_server.pocket.scores import WAITING, intersection_over_union, task_item
from promptmux_server.tasks import BoxOutput, LabelOutput


def answers(dtype: torch.dtype, data: SceneDataset, count: int) -> dict[TaskName, list[Output | None]]:
    """Every task's answers about the first pictures, computed in one element type; None where no box was found."""
    backbone = load_backbone(WEIGHTS)
    model = assemble(backbone, dtype=dtype, packed=True)
    found: dict[TaskName, list[Output | None]] = {}
    with engine_over(LIBRARY, model, backbone.tokenizer(), backbone.fingerprint) as engine:
        for task in TASKS:
            found[task] = []
            for start in range(0, count, WAITING):
                items = [task_item(task, data, index) for index in range(start, min(start + WAITING, count))]
                futures = [engine.submit(item.request) for item in items]
                found[task] += [output(future) for future in futures]
    return found


def output(future: Future[Answer]) -> Output | None:
    try:
        return future.result().output
    except NoBoxFound:
        return None


def agreement(task: TaskName, exact: list[Output | None], rounded: list[Output | None]) -> dict[str, object]:
    pairs = list(zip(exact, rounded, strict=True))
    line: dict[str, object] = {"task": task, "pictures": len(pairs)}
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
    parser.add_argument("--heldout", type=Path, default=Path("var/pocket/heldout"))
    parser.add_argument("--pictures", type=int, default=500)
    arguments = parser.parse_args()
    data = SceneDataset(arguments.heldout)
    exact, rounded = (answers(dtype, data, arguments.pictures) for dtype in (torch.float32, torch.bfloat16))
    for task in TASKS:
        print(json.dumps(agreement(task, exact[task], rounded[task])))


if __name__ == "__main__":
    main()
