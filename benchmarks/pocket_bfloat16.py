"""How often `pocket` answers in bfloat16 what it answers in float32: four tasks, 500 held-out pictures each.

    make art scenes && python benchmarks/pocket_bfloat16.py

Target: 99 % of the answers of a generated text, a label or a closed set. Boxes are compared by overlap as well: a
coordinate one bin away is another token.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from concurrent.futures import Future
from pathlib import Path

import torch

from promptmux_server.backbone.assemble import assemble
from promptmux_server.backbone.images import from_array
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.request import Answer, Output, Request
from promptmux_server.errors import NoBoxFound
from promptmux_server.pocket import LIBRARY, WEIGHTS
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.samples import TASKS, TaskName, task_sample
from promptmux_server.pocket.scores import intersection_over_union
from promptmux_server.tasks import BoxOutput, LabelOutput

WAITING = 64


def answers(dtype: torch.dtype, data: SceneDataset, count: int) -> dict[TaskName, list[Output | None]]:
    """Every task's answers about the first pictures, computed in one element type; None where no box was found."""
    backbone = load_backbone(WEIGHTS)
    assert backbone.tokenizer_dir is not None
    config = backbone.config
    tokenizer = Tokenizer.load(backbone.tokenizer_dir, num_codes=config.num_codes, num_bins=config.num_bins)
    model = assemble(backbone, dtype=dtype, packed=True)
    engine = Engine(model, tokenizer, backbone.fingerprint, LIBRARY, queue_size=2 * WAITING)
    engine.start()
    found: dict[TaskName, list[Output | None]] = {}
    for task in TASKS:
        found[task] = []
        for start in range(0, count, WAITING):
            futures = [engine.submit(request(task, data, i)) for i in range(start, min(start + WAITING, count))]
            found[task] += [output(future) for future in futures]
    engine.stop(5.0)
    return found


def output(future: Future[Answer]) -> Output | None:
    try:
        return future.result().output
    except NoBoxFound:
        return None


def request(task: TaskName, data: SceneDataset, index: int) -> Request:
    pixels, scene = data[index]
    text = task_sample(task, scene, random.Random(scene.seed)).text
    return Request(
        request_id=str(index), task=task, text=text, image=from_array(pixels), deadline=time.monotonic() + 600.0
    )


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
