"""A search's passes over a vocabulary equal PyTorch's, whatever the width, and keep the order of equals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from promptmux_kernels import cpu
from promptmux_kernels.vocabulary import log_normalisers, top_tokens

compiled = pytest.mark.skipif(not cpu.available(torch.float32), reason="no compiler, or no AVX2")

WIDTHS = [1, 7, 16, 59, 64, 1003]


def logits_of(rows: int, width: int) -> Tensor:
    return 5.0 * torch.randn(rows, width, generator=torch.Generator().manual_seed(width))


def exact_best(logits: Tensor, before: Tensor, count: int) -> Tensor:
    return (logits.double().log_softmax(-1) + before.double()[:, None]).flatten().topk(count).values


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_best_tokens_are_those_of_a_full_sort(rows: int, width: int) -> None:
    logits, before = logits_of(rows, width), torch.linspace(-3.0, 0.0, rows)
    count = min(10, rows * width)
    scores, places = top_tokens(logits, log_normalisers(logits), before, count)
    expected = exact_best(logits, before, count)
    assert (scores - expected).abs().max() < 1e-5  # of scores up to 30: a few float32 roundings
    said = (logits.log_softmax(-1) + before[:, None]).flatten()[places]
    assert (said - expected).abs().max() < 1e-5
    assert len(set(places.tolist())) == count


def test_the_comparison_sees_a_token_that_was_overlooked() -> None:
    logits, before = logits_of(5, 64), torch.zeros(5)
    expected = exact_best(logits, before, 10)
    logits[logits == logits.max()] = -1.0
    scores, _ = top_tokens(logits, log_normalisers(logits), before, 10)
    assert (scores - expected).abs().max() > 1e-2


@compiled
def test_of_equal_scores_the_lower_token_and_row_come_first() -> None:
    logits = torch.zeros(3, 100)
    _, places = top_tokens(logits, log_normalisers(logits), torch.zeros(3), 5)
    assert places.tolist() == [0, 1, 2, 3, 4]


def test_what_is_excluded_is_not_chosen_while_anything_else_is_left() -> None:
    logits = logits_of(2, 40)
    normalisers = log_normalisers(logits)
    logits[:, :37] = -torch.inf
    scores, places = top_tokens(logits, normalisers, torch.zeros(2), 8)
    assert sorted(places[:6].tolist()) == [37, 38, 39, 77, 78, 79]
    assert scores[6:].tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 17, 58])
def test_a_row_that_is_not_finite_has_no_normaliser(poison: float, place: int) -> None:
    logits = logits_of(2, 59)
    logits[0, place] = poison
    found = log_normalisers(logits)
    assert not found[0].isfinite()
    assert found[1].isfinite()


@compiled
def test_rows_of_a_wider_tensor_are_read_where_they_lie() -> None:
    wide = logits_of(4, 80)
    part = wide[:, :59]
    assert torch.equal(log_normalisers(part), log_normalisers(part.contiguous()))
