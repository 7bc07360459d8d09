"""Searches against exhaustive enumeration, on a toy language whose logits depend on the whole history."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from promptmux_server.backbone.config import EOS, PAD
from promptmux_server.engine.decoding import NonFiniteLogits, Search, Trie, make_search
from promptmux_server.errors import InvalidParameter
from promptmux_server.tasks.decoding import DecodingParams, Outcome

VOCABULARY = 9
Model = Callable[[tuple[int, ...]], Tensor]


def toy(seed: int) -> Model:
    """Logits that are a fixed random function of the tokens so far."""

    def logits(history: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, history)) % (1 << 31))
        return torch.randn(VOCABULARY, generator=generator) * 2

    return logits


def drive(search: Search, model: Model) -> Outcome:
    """Run a search to its end, as the runner does."""
    rows: list[tuple[int, ...]] = [()]
    step = search.advance(model(())[None])
    while step is not None:
        assert len(step.tokens) == len(step.parents) <= search.width
        rows = [(*rows[parent], token) for token, parent in zip(step.tokens, step.parents, strict=True)]
        step = search.advance(torch.stack([model(row) for row in rows]))
    return search.outcome()


def log_prob(model: Model, tokens: Sequence[int], temperature: float = 1.0) -> float:
    return sum(float((model(tuple(tokens[:i])) / temperature).log_softmax(-1)[token]) for i, token in enumerate(tokens))


def every_text(min_length: int, max_length: int) -> list[tuple[int, ...]]:
    words = [token for token in range(VOCABULARY) if token not in (PAD, EOS)]
    return [(*text, EOS) for n in range(min_length, max_length + 1) for text in itertools.product(words, repeat=n)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("penalty", "normalize"), [(1.0, True), (0.6, True), (1.0, False)])
def test_beam_search_never_beats_and_often_finds_the_best_text(seed: int, penalty: float, normalize: bool) -> None:
    params = DecodingParams(beam_size=8, min_length=1, max_length=3, length_penalty=penalty, normalize=normalize)
    model = toy(seed)
    outcome = drive(make_search(params), model)

    def score(text: tuple[int, ...]) -> float:
        total = log_prob(model, text)
        return total / len(text) ** penalty if normalize else total

    best = max(score(text) for text in every_text(1, 3))
    for hypothesis in outcome.hypotheses:
        assert hypothesis.score == pytest.approx(score(hypothesis.tokens), abs=1e-4)
        assert hypothesis.score <= best + 1e-4
        assert sum(hypothesis.positional_scores) == pytest.approx(log_prob(model, hypothesis.tokens), abs=1e-4)
    scores = [hypothesis.score for hypothesis in outcome.hypotheses]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 8


@pytest.mark.parametrize("seed", range(10))
def test_a_beam_of_one_is_greedy(seed: int) -> None:
    model = toy(seed)
    history: tuple[int, ...] = ()
    while len(history) < 6:
        logits = model(history)
        logits[PAD] = -torch.inf
        if not history:
            logits[EOS] = -torch.inf
        token = int(logits.argmax())
        history = (*history, token)
        if token == EOS:
            break
    expected = history if history[-1] == EOS else (*history[:5], EOS)
    outcome = drive(make_search(DecodingParams(method="greedy", max_length=5)), model)
    # A beam of one looks at two candidates: where eos comes second it is not finished, as in greedy search.
    assert outcome.hypotheses[0].tokens[: len(expected) - 1] == expected[:-1]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 1), (3, 3), (2, 6)])
def test_lengths_are_kept(low: int, high: int) -> None:
    params = DecodingParams(beam_size=5, min_length=low, max_length=high)
    for seed in range(8):
        for hypothesis in drive(make_search(params), toy(seed)).hypotheses:
            assert low <= len(hypothesis.tokens) - 1 <= high
            assert hypothesis.tokens[-1] == EOS
            assert PAD not in hypothesis.tokens


def test_no_ngram_repeats_the_prefix_included() -> None:
    params = DecodingParams(beam_size=4, max_length=12, no_repeat_ngram=2)
    for seed in range(10):
        for hypothesis in drive(make_search(params, prefix=(0, 5, 6)), toy(seed)).hypotheses:
            text = (0, 5, 6, *hypothesis.tokens[:-1])
            pairs = list(itertools.pairwise(text))
            assert len(set(pairs)) == len(pairs)


def test_ngrams_repeat_where_nothing_forbids_it() -> None:
    """The control of the test above."""
    params = DecodingParams(beam_size=4, max_length=12)
    texts = [h.tokens for seed in range(10) for h in drive(make_search(params), toy(seed)).hypotheses]
    assert any(len(set(pairs)) < len(pairs) for pairs in (list(itertools.pairwise(text)) for text in texts))


ANSWERS = ((4,), (4, 5), (4, 5, 6), (7, 8), (8,), (3, 3, 3))


def masked_score(model: Model, answer: tuple[int, ...]) -> float:
    """One candidate at a time, as ofa-spec 9.3 states it."""
    trie, total = Trie(ANSWERS), 0.0
    path = (*answer, EOS)
    for i, token in enumerate(path):
        allowed = list(trie.children(path[:i]))
        total += float(model(path[:i])[allowed].log_softmax(-1)[allowed.index(token)])
    return total


@pytest.mark.parametrize("seed", range(6))
def test_all_candidates_score_as_if_one_by_one(seed: int) -> None:
    model = toy(seed)
    outcome = drive(make_search(DecodingParams(method="candidates"), candidates=ANSWERS), model)
    expected = [masked_score(model, answer) for answer in ANSWERS]
    assert outcome.candidate_scores == pytest.approx(expected, abs=1e-4)
    assert outcome.hypotheses[0].tokens == (*ANSWERS[expected.index(max(expected))], EOS)
    assert sum(torch.tensor(expected).exp()) == pytest.approx(1.0, abs=1e-4)


def test_single_token_answers_need_one_pass() -> None:
    """ofa-spec 9.3: what follows is certain, so nothing more is run."""
    search = make_search(DecodingParams(method="candidates"), candidates=((4,), (5,), (6,)))
    assert search.advance(toy(1)(())[None]) is None


@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
def test_a_constrained_search_stays_in_its_answers(method: str) -> None:
    for seed in range(20):
        params = DecodingParams(method=method, beam_size=3, max_length=5, constrained=True, seed=seed)  # type: ignore[arg-type]
        outcome = drive(make_search(params, candidates=ANSWERS), toy(seed))
        assert outcome.hypotheses
        assert all(hypothesis.tokens[:-1] in ANSWERS for hypothesis in outcome.hypotheses)


def test_an_answer_set_is_needed_to_choose_from() -> None:
    for params in (DecodingParams(method="candidates"), DecodingParams(constrained=True)):
        with pytest.raises(InvalidParameter, match="no closed answer set"):
            make_search(params)


def test_a_seed_draws_the_same_text_whatever_was_drawn_before() -> None:
    params = DecodingParams(method="sample", seed=11, max_length=8)
    first = drive(make_search(params), toy(3))
    torch.manual_seed(random.randrange(1000))
    drive(make_search(DecodingParams(method="sample", seed=12, max_length=8)), toy(3))
    assert drive(make_search(params), toy(3)) == first


def test_seeds_draw_different_texts() -> None:
    texts = {
        drive(make_search(DecodingParams(method="sample", seed=s, max_length=8)), toy(3)).hypotheses[0].tokens
        for s in range(20)
    }
    assert len(texts) > 5


def test_top_k_of_one_is_the_most_likely_token() -> None:
    outcome = drive(make_search(DecodingParams(method="sample", seed=1, top_k=1, max_length=4)), toy(5))
    for i, token in enumerate(outcome.hypotheses[0].tokens[:-1]):
        logits = toy(5)(outcome.hypotheses[0].tokens[:i])
        logits[PAD] = -torch.inf
        if i < 1:
            logits[EOS] = -torch.inf
        assert token == int(logits.argmax())


def test_sampling_follows_the_distribution() -> None:
    """2,000 draws of the first token: a chi-square statistic far above its expectation would be a bias."""
    logits = toy(7)(())
    allowed = [t for t in range(VOCABULARY) if t not in (PAD, EOS)]
    expected = logits[allowed].softmax(-1) * 2000
    counts = torch.zeros(VOCABULARY)
    for seed in range(2000):
        search = make_search(DecodingParams(method="sample", seed=seed, max_length=1))
        step = search.advance(logits[None].clone())
        assert step is not None
        counts[step.tokens[0]] += 1
    assert (
        float(((counts[allowed] - expected) ** 2 / expected).sum()) < 24.3
    )  # 0.1 % point of chi-square, 7 - 1 degrees


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("method", ["beam", "sample", "candidates"])
def test_non_finite_logits_are_an_error(value: float, method: str) -> None:
    search = make_search(DecodingParams(method=method), candidates=ANSWERS)  # type: ignore[arg-type]
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 4] = value
    with pytest.raises(NonFiniteLogits):
        search.advance(logits)
