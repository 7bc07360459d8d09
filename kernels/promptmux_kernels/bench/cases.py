"""The launches that get compiled and held to bars: every kernel, in the configurations that a target would choose.

Shapes are small, since machine code depends on widths, types and alignment only; the two head sizes are those of the
released models (64 in all but OFA-huge, 80 there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from promptmux_kernels import use_form
from promptmux_kernels.triton_ops import configs, launch, samples
from promptmux_kernels.triton_ops.launch import Launch
from promptmux_kernels.triton_ops.samples import Call, Widths

PICTURE = [930, 930]
TEXT = [30, 30]
PROMPTS = [64, 7]

HOST = torch.device("cpu")
NARROW = Widths(12, 64, 3072, torch.bfloat16, HOST)
WIDE = Widths(16, 80, 5120, torch.bfloat16, HOST)
EXACT = Widths(12, 64, 3072, torch.float32, HOST)


@dataclass(frozen=True)
class Case:
    """A kernel of an op with a model's widths; ops of two kernels make two cases."""

    name: str
    widths: Widths
    launch: Launch


def cases(where: str, widths: Widths) -> Iterator[Case]:
    """What `where` would run for these widths, by its default configurations."""
    for name, make in _CALLS.items():
        with use_form("triton"), configs.compiling_for(where), launch.recorded() as launches:
            make(widths)()
        kernels = launches if "in parts" in name else launches[:1]
        for recorded in kernels:
            merge = recorded is not kernels[0]
            yield Case(f"{name}, merge" if merge else name, widths, recorded)


def _split(widths: Widths) -> Call:
    """Two requests on a device of 132 processors leave most of it idle, so that the keys are split."""
    call = samples.cross_step(widths, PICTURE, 5, 16)

    def on_a_large_device() -> object:
        with launch.counting(132):
            return call()

    return on_a_large_device


_CALLS: dict[str, Callable[[Widths], Call]] = {
    "prefix_attention": lambda widths: samples.encoder_attention(widths, PICTURE, PROMPTS),
    "prefix_attention, texts": lambda widths: samples.encoder_attention(widths, TEXT, PROMPTS),
    "prefix_attention, causal": lambda widths: samples.decoder_prefill(widths, TEXT, PROMPTS),
    "prefix_attention, factors": lambda widths: samples.encoder_attention(widths, PICTURE, PROMPTS, factors=True),
    "prefix_decode_attention": lambda widths: samples.decode_step(widths, 2, 5, 16, PROMPTS),
    "cross_decode_attention": lambda widths: samples.cross_step(widths, PICTURE, 5, 16),
    "cross_decode_attention, in parts": _split,
    "cross_decode_attention, prefill": lambda widths: samples.cross_prefill(widths, PICTURE, 16),
    "norm_add_norm": lambda widths: samples.join_branches(widths, 64),
    "gelu_norm": lambda widths: samples.feed_forward_norm(widths, 64),
    "write_cache": lambda widths: samples.store_tokens(widths, 64),
}
