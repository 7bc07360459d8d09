"""Run by `test_triton_compiled.py` in a process where kernels are not interpreted; prints one JSON document."""

from __future__ import annotations

import json
import random
import sys

import torch

from promptmux_kernels import use_form
from promptmux_kernels.bench import bars, cases, compiled
from promptmux_kernels.triton_ops import configs, launch, samples, warm_up
from promptmux_kernels.triton_ops.configs import Config
from promptmux_kernels.triton_ops.samples import Widths

KERNELS = ("prefix_attention", "prefix_attention, factors", "prefix_decode_attention", "cross_decode_attention")
"""Those with something to lose; the command compiles the rest as well."""


def main(targets: list[str]) -> None:
    found = {
        f"{where} {case.name}": bars.faults(bars.Entry(case, where, compiled.compile_launch(case.launch, where)))
        for where in targets
        for case in cases.cases(where, cases.NARROW)
        if case.name in KERNELS
    }
    json.dump({"faults": found, "spilling": spilling(), "cold": cold_variants()}, sys.stdout)


def spilling() -> list[str]:
    """The control: a tile that four warps cannot hold."""
    with use_form("triton"), configs.forced(Config(128, 128, 4, 2)), launch.recorded() as launches:
        samples.encoder_attention(cases.NARROW, cases.PICTURE, cases.PROMPTS)()
    case = cases.Case("prefix_attention", cases.NARROW, launches[0])
    return bars.faults(bars.Entry(case, "sm_90", compiled.compile_launch(launches[0], "sm_90")))


def cold_variants() -> list[str]:
    """What random batches would compile that warming up did not."""
    widths = Widths(2, 64, 256, torch.bfloat16, torch.device("cpu"))
    with use_form("triton"), configs.compiling_for("sm_90"), launch.counting(132):
        with launch.recorded() as warm:
            for call in warm_up.variants(widths):
                call()
        with launch.recorded() as met:
            for seed in range(40):
                random_batch(random.Random(seed), widths)
    known = {compiled.variant(one) for one in warm}
    assert known
    return sorted({compiled.variant(one) for one in met} - known)


def random_batch(rng: random.Random, widths: Widths) -> None:
    rows = rng.choice([1, 2, 3, 16])
    lengths = [rng.choice([1, 7, 30, 64, 129, 600]) for _ in range(rows)]
    prompts = [rng.choice([0, 1, 64, 200]) for _ in range(rows)]
    beams, step = rng.choice([1, 3, 5, 16]), rng.choice([1, 2, 16, 33, 150])
    samples.encoder_attention(widths, lengths, prompts, factors=rng.random() < 0.5)()
    samples.decoder_prefill(widths, lengths, prompts)()
    samples.decode_step(widths, rows, beams, step, prompts)()
    samples.cross_step(widths, lengths, beams, step)()
    samples.cross_prefill(widths, lengths, rng.choice([1, 4, 16]))()
    samples.join_branches(widths, sum(lengths))()
    samples.feed_forward_norm(widths, sum(lengths))()
    samples.store_tokens(widths, rows * beams)()


if __name__ == "__main__":
    main(sys.argv[1:])
