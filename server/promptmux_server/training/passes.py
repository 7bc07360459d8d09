"""One forward and backward pass of the rows of many runs, which leaves each run's gradient with its own parameters.

Owns how the runs' rows, prompts, pictures and noise are laid side by side. Knows no optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from promptmux_kernels import PromptBatch, pack_rows
from promptmux_server.backbone.assemble import serving_dtype
from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.passes import PassOptions
from promptmux_server.training.batch import Picture, seen
from promptmux_server.training.forward import Example, supervised_logits
from promptmux_server.training.loss import LossNumbers
from promptmux_server.training.methods.method import Sides
from promptmux_server.training.noise import BatchNoise, RunNoise
from promptmux_server.training.recipe import ComputeRecipe
from promptmux_server.training.run import Part, Run

Sharing = Sequence[tuple[Run, Part]]
"""The runs of one pass, all on one model, each with its batch."""


def backward(sharing: Sharing, compute: ComputeRecipe) -> list[LossNumbers]:
    """Add the gradient of each run's summed loss to its parameters, unless that loss is not finite."""
    model = sharing[0][0].method.model
    noise = BatchNoise(
        [
            RunNoise(part.chance, len(part.batch.examples), run.recipe.backbone_dropout, run.recipe.backbone_drop_path)
            for run, part in sharing
        ]
    )
    options = PassOptions(None if noise.silent else noise, compute.recompute)
    with _precision(model.device, compute):
        images = seen(model, list(_pictures(sharing)))
        logits, targets = supervised_logits(model, list(_examples(sharing)), images, *_prompts(sharing), options)
    losses = []
    start = 0
    for run, part in sharing:
        end = start + sum(len(example.target) + 1 for example in part.batch.examples)
        losses.append(run.loss(logits[start:end], targets[start:end], part.batch))
        start = end
    sums = torch.stack([torch.stack([loss.total, loss.nll]) for loss in losses]).tolist()
    healthy = [loss.total for loss, (total, _) in zip(losses, sums, strict=True) if math.isfinite(total)]
    if healthy:
        torch.stack(healthy).sum().backward()
    return [LossNumbers(total, nll, loss.tokens) for loss, (total, nll) in zip(losses, sums, strict=True)]


def _precision(device: torch.device, compute: ComputeRecipe) -> AbstractContextManager[object]:
    if compute.autocast and serving_dtype(device) == torch.bfloat16:
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _examples(sharing: Sharing) -> Iterator[Example]:
    """All rows' examples, their pictures numbered through."""
    pictures = 0
    for _, part in sharing:
        for example in part.batch.examples:
            yield example if example.image is None else replace(example, image=example.image + pictures)
        pictures += len(part.batch.pictures)


def _pictures(sharing: Sharing) -> Iterator[Picture]:
    """All rows' pictures. Raises ValueError where a method that trains the stem is given what the stem said before."""
    for run, part in sharing:
        if run.method.needs_pixels and any(isinstance(picture, ImageTokens) for picture in part.batch.pictures):
            raise ValueError("this method changes what the stem says: its batches must bring pixels")
        yield from part.batch.pictures


def _prompts(sharing: Sharing) -> tuple[PromptBatch | None, PromptBatch | None]:
    """Both sides' prompts of all rows in one pool each."""
    sides: list[Sides] = []
    for run, part in sharing:
        prompts = run.method.prompts(len(part.batch.examples), part.chance)
        if prompts is None:
            assert len(sharing) == 1, "a method without prompts has a model of its own"
            return None, None
        sides.append(prompts)
    dtype = sharing[0][0].method.model.dtype
    return pack_rows([encoder for encoder, _ in sides], dtype), pack_rows([decoder for _, decoder in sides], dtype)
