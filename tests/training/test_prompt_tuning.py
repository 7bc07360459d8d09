"""Tuning learns prompts and touches nothing else; the loss is the formula."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tiny
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.tasks.trie import Trie
from promptmux_server.training.forward import Example, supervised_logits
from promptmux_server.training.loss import label_smoothed_loss
from promptmux_server.training.tuner import PromptTables, TuningBatch, TuningRecipe, tune

EXAMPLES = [
    Example((BOS, 10, 11, EOS), (BOS,), (20, 21), None),
    Example((BOS, 12, EOS), (BOS,), (22,), None),
    Example((BOS, 13, 14, 15, EOS), (BOS, 13), (20,), None),
]
RECIPE = TuningRecipe(encoder_length=4, decoder_length=3, steps=60, learning_rate=0.1)


def batches() -> Iterator[TuningBatch]:
    while True:
        yield TuningBatch(EXAMPLES, [])


def nll(tables: PromptTables) -> float:
    with torch.no_grad():
        logits, targets = supervised_logits(tiny.model(), EXAMPLES, [], *tables.batches(len(EXAMPLES)))
        return float(label_smoothed_loss(logits, targets, smoothing=0.0).mean)


def test_tuning_lowers_the_loss_and_leaves_the_backbone_alone() -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model().state_dict().items()}
    start = nll(PromptTables(tiny.config(), RECIPE).eval())
    tables = tune(tiny.model(), RECIPE, batches())
    assert nll(tables) < 0.7 * start
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model().state_dict().items())


def test_the_same_seed_gives_the_same_prompt() -> None:
    first, second = (tune(tiny.model(), RECIPE, batches()).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_backbone_that_would_train_is_refused() -> None:
    parameter = tiny.model().encoder.layer_norm.weight
    parameter.requires_grad_(True)
    try:
        with pytest.raises(ValueError, match="not frozen"):
            tune(tiny.model(), RECIPE, batches())
    finally:
        parameter.requires_grad_(False)


def test_dropout_thins_every_rows_prompt_on_its_own_while_training_only() -> None:
    recipe = TuningRecipe(encoder_length=8, decoder_length=8, prompt_dropout=0.2)
    tables = PromptTables(tiny.config(), recipe)
    encoder, _ = tables.train().batches(2)
    first, second = encoder.layer(0).gather(0)[0], encoder.layer(0).gather(1)[0]
    assert not torch.equal(first, second)
    assert 0.1 < float((first == 0).float().mean()) < 0.3
    encoder, _ = tables.eval().batches(2)
    assert torch.equal(encoder.layer(0).gather(0)[0], encoder.layer(0).gather(1)[0])


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


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    recipe = TuningRecipe(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[9])
    assert rates[-1] == pytest.approx(0.01)


def test_a_closed_answer_set_allows_what_may_follow_and_nothing_else() -> None:
    batch = TuningBatch(EXAMPLES, [], Trie([(20, 21), (22,), (20,)]))
    allowed = batch.allowed(30)
    assert allowed is not None
    rows = [row.nonzero().flatten().tolist() for row in allowed]
    assert rows == [[20, 22], [EOS, 21], [EOS], [20, 22], [EOS], [20, 22], [EOS, 21]]
    assert TuningBatch(EXAMPLES, []).allowed(30) is None
