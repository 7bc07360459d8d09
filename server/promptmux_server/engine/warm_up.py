"""Before the first request: real passes of every stage, so that nothing is compiled late and costs are known.

The backbone alone answers, on grey pictures; nothing of it stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.model import OFA
from promptmux_server.engine.cost_model import CostModel
from promptmux_server.engine.decoding import make_search
from promptmux_server.engine.memory import DecodingMemory
from promptmux_server.engine.prompt_table import NO_PROMPT
from promptmux_server.engine.runner import RunningBatch, Work
from promptmux_server.tasks.decoding import DecodingParams

SIZES = (1, 2)
"""Requests a pass: two points make a line."""
STEPS = 4


def warm_up(model: OFA, batch: RunningBatch, memory: DecodingMemory, costs: CostModel) -> None:
    """Answer made-up requests, the first time unmeasured; the batch is empty before and after."""
    _answer(model, batch, memory, CostModel(), 1)
    for size in SIZES:
        _answer(model, batch, memory, costs, size)


def _answer(model: OFA, batch: RunningBatch, memory: DecodingMemory, costs: CostModel, size: int) -> None:
    side = model.config.image_size
    pixels = torch.zeros(size, 3, side, side)
    images: list[ImageTokens] = []
    costs.observe("stem", size, _milliseconds(lambda: images.extend(model.image_tokens(pixels))))
    params = DecodingParams(beam_size=5, min_length=STEPS, max_length=STEPS)
    works = [Work((BOS, EOS), (BOS,), image, make_search(params), prompt=NO_PROMPT) for image in images]
    claims = [memory.claim(work.slots, work.memory_length) for work in works]
    entries = [(row, work, claim) for row, (work, claim) in enumerate(zip(works, claims, strict=True)) if claim]
    if entries:  # a memory that holds no picture is told to the request that brings one
        tokens = sum(work.memory_length for _, work, _ in entries)
        costs.observe("encode", tokens, _milliseconds(lambda: batch.join(entries)))
    while batch.live_rows:
        rows = sum(work.search.width for _, work, _ in entries)
        costs.observe("step", rows, _milliseconds(batch.step))
    batch.take_finished()
    for claim in claims:
        if claim:
            memory.release(claim)


def _milliseconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1000.0 * (time.perf_counter() - started)
