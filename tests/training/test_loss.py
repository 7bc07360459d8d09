"""The loss is the released formula over targets and eos; nothing that is no number is dropped in silence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.tasks.trie import Trie
from promptmux_server.training.batch import TrainingBatch
from promptmux_server.training.forward import Example, supervised_logits
from promptmux_server.training.loss import label_smoothed_loss

EXAMPLES = [
    Example((BOS, 10, 11, EOS), (BOS,), (20, 21), None),
    Example((BOS, 12, EOS), (BOS,), (22,), None),
    Example((BOS, 13, 14, 15, EOS), (BOS, 13), (20,), None),
]


def test_only_targets_and_eos_are_scored() -> None:
    logits, targets = supervised_logits(tiny.model(), EXAMPLES, [])
    assert targets.tolist() == [20, 21, EOS, 22, EOS, 20, EOS]
    assert logits.shape == (7, tiny.config().vocab_size)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_formula(smoothing: float) -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 3, 10, 3, 7])
    expected = 0.0
    for row, target in zip(logits.log_softmax(-1), targets.tolist(), strict=True):
        share = smoothing / 10
        expected += float((1 - smoothing - share) * -row[target] + share * -row.sum())
    loss = label_smoothed_loss(logits, targets, smoothing=smoothing)
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert float(loss.nll) == pytest.approx(float(-logits.log_softmax(-1)[range(5), targets].sum()), rel=1e-5)


def test_a_closed_answer_set_confines_loss_and_smoothing() -> None:
    logits = torch.zeros(1, 6)
    allowed = torch.tensor([[True, True, False, False, False, False]])
    loss = label_smoothed_loss(logits, torch.tensor([0]), smoothing=0.1, allowed=allowed)
    half = float(torch.tensor(2.0).log())
    share = 0.1 / (1 + 1e-6)
    assert float(loss.total) == pytest.approx((0.9 - share) * half + share * 2 * half, rel=1e-5)


def test_confidence_scales_log_probabilities() -> None:
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
    plain = label_smoothed_loss(logits, torch.tensor([1, 2]), smoothing=0.0)
    half = label_smoothed_loss(logits, torch.tensor([1, 2]), smoothing=0.0, confidence=torch.tensor([0.5, 0.5]))
    assert float(half.nll) == pytest.approx(0.5 * float(plain.nll))


def test_a_batchs_confidence_counts_for_every_token_of_its_example() -> None:
    assert TrainingBatch(EXAMPLES, []).confidence() is None
    doubtful = [EXAMPLES[0], replace(EXAMPLES[1], confidence=0.5), EXAMPLES[2]]
    confidence = TrainingBatch(doubtful, []).confidence()
    assert confidence is not None
    assert confidence.tolist() == [1.0, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0]


def logits_of_losses(losses: list[float]) -> torch.Tensor:
    """Logits (T, 2) whose nll for target 0 is as given."""
    logits = torch.zeros(len(losses), 2, dtype=torch.float64)
    logits[:, 1] = torch.tensor(losses, dtype=torch.float64).expm1().log()
    return logits


def test_of_the_worst_tokens_nothing_is_learned() -> None:
    losses = [3.0, 0.5, 1.0, 9.0, 2.0, 0.1, 4.0]  # 0.8 of 7 tokens, rounded down: the 5 smallest
    logits = logits_of_losses(losses).float().requires_grad_()
    loss = label_smoothed_loss(logits, torch.zeros(7, dtype=torch.int64), smoothing=0.0, drop_worst=0.2)
    assert loss.tokens == 5
    assert float(loss.total.detach()) == pytest.approx(6.6, rel=1e-5)
    assert float(loss.nll.detach()) == pytest.approx(6.6, rel=1e-5)
    loss.total.backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(1).eq(0.0).tolist() == [False, False, False, True, False, False, True]


def test_one_token_is_always_kept() -> None:
    loss = label_smoothed_loss(logits_of_losses([2.0]), torch.tensor([0]), smoothing=0.0, drop_worst=0.9)
    assert loss.tokens == 1


@pytest.mark.parametrize("fault", [float("nan"), float("-inf")], ids=["nan", "target-outside-its-answer-set"])
def test_a_loss_that_is_no_number_is_not_dropped_as_a_bad_token(fault: float) -> None:
    logits = logits_of_losses([1.0, 1.0, 1.0, 1.0, 1.0])
    logits[2, 0] = fault
    loss = label_smoothed_loss(logits, torch.zeros(5, dtype=torch.int64), smoothing=0.0, drop_worst=0.5)
    assert not bool(loss.total.isfinite())


def test_a_closed_answer_set_allows_what_may_follow_and_nothing_else() -> None:
    batch = TrainingBatch(EXAMPLES, [], Trie([(20, 21), (22,), (20,)]))
    allowed = batch.allowed(30)
    assert allowed is not None
    rows = [row.nonzero().flatten().tolist() for row in allowed]
    assert rows == [[20, 22], [EOS, 21], [EOS], [20, 22], [EOS], [20, 22], [EOS, 21]]
    assert TrainingBatch(EXAMPLES, []).allowed(30) is None
