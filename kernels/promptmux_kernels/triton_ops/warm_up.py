"""Compile, and where asked tune, every kernel variant that serving will need, before the first request is answered.

A variant is what triton compiles anew for: a configuration, a bias path, split or whole, causal or not. Arguments that
change from batch to batch are not specialised on, so the list is complete; a test holds it against random batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from promptmux_kernels.triton_ops import configs, launch, samples, tuner
from promptmux_kernels.triton_ops.configs import LONG, ShapeClass
from promptmux_kernels.triton_ops.samples import Call, Widths

PICTURE = 30 * 30
"""Patches of a 480 px picture: what a long sequence is timed with."""


def warm_up(widths: Widths, tuned_in: Path | None = None, timer: tuner.Timer = tuner.gpu_milliseconds) -> int:
    """Make every variant's first call; returns how many calls were made. With `tuned_in`, tune under that directory."""
    with launch.on(widths.device):
        if tuned_in is not None:
            where = configs.target(widths.device)
            name = torch.cuda.get_device_name(widths.device) if widths.device.type == "cuda" else where
            tuner.tune(dict(tuned_calls(widths)), where, tuned_in, name, timer)
        calls = list(variants(widths))
        for call in calls:
            call()
        return len(calls)


def tuned_calls(widths: Widths) -> Iterator[tuple[ShapeClass, Call]]:
    """One typical call per shape class that has a choice."""
    element = str(widths.dtype).removeprefix("torch.")

    def shape(op: str, *, long: bool) -> ShapeClass:
        return ShapeClass(op, widths.head_dim, element, long)

    pictures, texts, prompts = [PICTURE + 30] * 8, [30] * 8, [64] * 8
    for op, factors in (("prefix_attention", False), ("prefix_attention_factors", True)):
        yield shape(op, long=True), samples.encoder_attention(widths, pictures, prompts, factors=factors)
        yield shape(op, long=False), samples.encoder_attention(widths, texts, prompts, factors=factors)
    yield shape("prefix_decode_attention", long=False), samples.decode_step(widths, 8, 5, 8, prompts)
    yield shape("prefix_decode_attention", long=True), samples.decode_step(widths, 8, 5, LONG + 1, prompts)
    for long, lengths in ((True, pictures), (False, texts)):
        yield shape("cross_decode_attention", long=long), samples.cross_step(widths, lengths, 5, 8)
        yield shape("cross_prefill_attention", long=long), samples.cross_prefill(widths, lengths, 16)


def variants(widths: Widths) -> Iterator[Call]:
    """One small call per variant."""
    short, long = 8, LONG + 1
    for length in (short, long):
        for factors in (False, True):
            yield samples.encoder_attention(widths, [length], [1], factors=factors)
        yield samples.decoder_prefill(widths, [length], [1])
        yield samples.decode_step(widths, 1, 1, length, [1])
        yield samples.cross_step(widths, [length], 1, 1)
        yield samples.cross_prefill(widths, [length], 1)
    # One request's picture is split over the device, as many as fill it are not.
    filling = -(-launch.processors(widths.device) // widths.heads)
    for requests in (1, filling):
        yield samples.cross_step(widths, [PICTURE] * requests, 1, 1)
        yield samples.cross_prefill(widths, [PICTURE] * requests, 1)
    yield samples.join_branches(widths, 1)
    yield samples.feed_forward_norm(widths, 1)
    yield samples.store_tokens(widths, 1)
