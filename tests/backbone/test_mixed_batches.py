"""A request's answer never depends on its neighbours: the promise of the whole design, on a tiny random backbone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import tiny
from promptmux_kernels import PagedPrompts, pack_prompts, use_form
from promptmux_prompts import Prompt
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.backbone.encoder import EncoderRow, ImageTokens
from promptmux_server.engine import runner
from promptmux_server.engine.decoding import make_search
from promptmux_server.engine.prompt_table import PromptPools, Residence
from promptmux_server.engine.runner import RunningBatch, Work, closed_batch
from promptmux_server.tasks.decoding import DecodingParams, Outcome

CPU = torch.device("cpu")
LENGTHS = [(0, 0), (1, 7), (64, 100), (128, 128), (7, 0), (0, 33), (32, 32), (31, 65)]
Depth = tuple[tuple[int, int] | None, tuple[int, int] | None]
"""Layers of encoder (of 2) and decoder (of 3) that carry a prompt; None: all."""
EVERYWHERE: tuple[Depth, ...] = ((None, None), ((0, 2), (0, 3)))
DEPTHS: list[Depth] = [
    *EVERYWHERE, ((0, 1), (0, 1)), ((1, 2), (2, 3)), ((0, 1), None), (None, (1, 3)), ((1, 2), None), (None, (0, 2)),
]  # fmt: skip
ANSWERS = ((10, 11), (10, 12), (20,), (30, 31, 32))

Case = tuple[int, tuple[int, ...], tuple[int, ...], ImageTokens | None, DecodingParams]
"""(prompt number, source, prefix, picture, parameters)."""


@pytest.fixture(scope="module")
def pools() -> tuple[PromptPools, list[Residence]]:
    pools = PromptPools(tiny.config(), torch.float32, CPU)
    depths = [EVERYWHERE[0]] * 8 + DEPTHS
    prompts = [deep_prompt(seed, *kind) for seed, kind in enumerate(zip(LENGTHS * 2, depths, strict=True))]
    return pools, [pools.store(prompt) for prompt in prompts]


def deep_prompt(seed: int, lengths: tuple[int, int], depth: Depth) -> Prompt:
    return tiny.prompt(
        f"p{seed}",
        seed=seed,
        encoder_length=lengths[0],
        decoder_length=lengths[1],
        encoder_layers=depth[0],
        decoder_layers=depth[1],
    )


def pictures() -> list[ImageTokens | None]:
    generator = torch.Generator().manual_seed(8)
    seen: list[ImageTokens | None] = [None]
    with torch.no_grad():
        for height, width in ((64, 64), (32, 128), (96, 48)):
            seen += tiny.model().image_tokens(torch.randn(2, 3, height, width, generator=generator))
    return seen


def random_cases(count: int, seed: int) -> list[Case]:
    rng = random.Random(seed)
    images = pictures()
    cases: list[Case] = []
    for _ in range(count):
        source = (BOS, *(rng.randrange(4, 300) for _ in range(rng.randint(1, 40))), EOS)
        prefix = source[:-1] if rng.random() < 0.3 else (BOS,)
        params = rng.choice(
            [
                DecodingParams(method="greedy", max_length=6),
                DecodingParams(
                    beam_size=rng.choice((2, 3, 5)), max_length=rng.randint(2, 7), no_repeat_ngram=rng.choice((0, 2))
                ),
                DecodingParams(method="sample", seed=rng.randrange(1000), max_length=5, top_k=20),
                DecodingParams(method="candidates"),
                DecodingParams(beam_size=3, max_length=8, constrained=True),
            ]
        )
        cases.append((rng.randrange(16), source, prefix, rng.choice(images), params))
    return cases


def run(
    cases: Sequence[Case], pools: PromptPools, homes: Sequence[Residence], dropped: Sequence[int] = ()
) -> tuple[list[Outcome | None], Tensor, list[int]]:
    """(outcomes, first logits of every row, rows that failed); rows in `dropped` leave after their first logits."""
    works = [
        Work(source, prefix, image, make_search(params, candidates=ANSWERS, prefix=prefix))
        for _, source, prefix, image, params in cases
    ]
    first: list[Tensor] = []

    class Recording(RunningBatch):
        def _prefill(self, part: Sequence[Any]) -> Tensor:
            logits = super()._prefill(part)
            first.append(logits.clone())  # searches write to theirs
            return logits

    failed: list[int] = []
    with torch.no_grad(), patch.object(runner, "RunningBatch", Recording):
        batch = closed_batch(tiny.model(), works, pools.batch([homes[prompt] for prompt, *_ in cases]))
        batch.drop(set(dropped))
        while batch.live_rows:
            batch.step()
        failed = sorted(batch.take_failed())
    outcomes = [None if row in failed or row in dropped else work.search.outcome() for row, work in enumerate(works)]
    return outcomes, first[0], failed


def test_64_mixed_requests_answer_as_if_alone(pools: tuple[PromptPools, list[Residence]]) -> None:
    cases = random_cases(64, seed=1)
    together, logits, failed = run(cases, *pools)
    assert failed == []
    for row, case in enumerate(cases):
        (alone,), own, _ = run([case], *pools)
        assert float((own[0] - logits[row]).abs().max()) <= 1e-4
        mixed = together[row]
        assert mixed is not None
        assert alone is not None
        assert [h.tokens for h in mixed.hypotheses] == [h.tokens for h in alone.hypotheses]
        for a, b in zip(mixed.hypotheses, alone.hypotheses, strict=True):
            assert abs(a.score - b.score) <= 1e-3


def test_another_prompt_gives_other_logits(pools: tuple[PromptPools, list[Residence]]) -> None:
    """The control: were prompts ignored, the test above would pass as well."""
    case = random_cases(1, seed=2)[0]
    _, with_one, _ = run([(2, *case[1:])], *pools)
    _, with_other, _ = run([(3, *case[1:])], *pools)
    assert float((with_one - with_other).abs().max()) > 1e-2


class InLayers:
    """A prompt on its own, and no pool at all in layers that do not carry it."""

    def __init__(self, key: Tensor, value: Tensor, layers: tuple[int, int] | None) -> None:
        self._pool, self._layers = pack_prompts([(key, value)], [0]), range(*(layers or (0, len(key))))

    def layer(self, index: int) -> PagedPrompts | None:
        return self._pool.layer(index) if index in self._layers else None


@torch.no_grad()
def reference_logits(case: Case, encoder: Any, decoder: Any) -> Tensor:
    """First logits of one request, by the form that is written to be read."""
    _, source, prefix, image, _ = case
    model = tiny.model()
    with use_form("reference"):
        memory = model.remember(model.encode([EncoderRow(source, image)], encoder))
        return model.logits(model.teach([prefix], memory, decoder)[-1:])[0]


def test_a_prompt_in_some_layers_is_no_prompt_in_the_others(pools: tuple[PromptPools, list[Residence]]) -> None:
    cases = [(8 + number, *case[1:]) for number, case in enumerate(random_cases(8, seed=4))]
    _, logits, _ = run(cases, *pools)
    for (number, *_), case, found in zip(cases, cases, logits, strict=True):
        prompt = deep_prompt(number, LENGTHS[number - 8], DEPTHS[number - 8])
        encoder, decoder = (prompt.encoder_key, prompt.encoder_value), (prompt.decoder_key, prompt.decoder_value)
        said = prompt.manifest
        expected = reference_logits(
            case, InLayers(*encoder, said.encoder_layers), InLayers(*decoder, said.decoder_layers)
        )
        assert float((found - expected).abs().max()) <= 1e-4
        zeros = reference_logits(case, InLayers(*encoder, None), InLayers(*decoder, None))
        difference = float((found - zeros).abs().max())  # zeros for absent layers are another answer
        assert (difference > 1e-2) is (DEPTHS[number - 8] not in EVERYWHERE)


def test_what_lies_in_the_pages_of_an_absent_layer_is_never_read() -> None:
    pools = PromptPools(tiny.config(), torch.float32, CPU)
    homes = [pools.store(deep_prompt(i, (40, 7), depth)) for i, depth in enumerate(DEPTHS[1:4])]
    cases = [(i % 3, *case[1:]) for i, case in enumerate(random_cases(12, seed=5))]
    clean = run(cases, pools, homes)
    for side in ("encoder", "decoder"):
        pool = getattr(pools, side)
        for home in homes:
            own = getattr(home, f"{side}_layers") or range(len(pool.key))
            for layer in set(range(len(pool.key))) - set(own):
                pool.key[layer, list(getattr(home, f"{side}_pages"))] = float("nan")
    poisoned = run(cases, pools, homes)
    assert poisoned[0] == clean[0]
    assert torch.equal(poisoned[1], clean[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("layer", [0, -1], ids=["first-layer", "last-layer"])
def test_a_poisoned_prompt_fails_its_own_requests_and_changes_no_other_bit(
    poison: float, side: str, layer: int
) -> None:
    pools = PromptPools(tiny.config(), torch.float32, CPU)
    homes = [
        pools.store(tiny.prompt(f"p{i}", seed=i, encoder_length=n, decoder_length=n))
        for i, n in enumerate((1, 7, 64, 100))
    ]
    cases = [(i % 4, *case[1:]) for i, case in enumerate(random_cases(16, seed=3))]
    own = [row for row, case in enumerate(cases) if case[0] == 2]
    # The benign run loses the same rows at the same moment: the shape of a float32 product changes its last bits.
    clean, _, _ = run(cases, pools, homes, dropped=own)
    pool = getattr(pools, side)
    pages = list(getattr(homes[2], f"{side}_pages"))
    pool.key[layer, pages] = poison
    pool.value[layer, pages] = poison
    poisoned, _, failed = run(cases, pools, homes)
    assert failed == own
    assert poisoned == clean
