"""Beam search with fairseq's rules, for one request (ofa-spec 9.4). Greedy search is a beam of one.

Of 2 * beam candidates a step, those that end in eos among the best `beam` become hypotheses; the best `beam` others
live on. The search ends with `beam` hypotheses or at the greatest length, where only eos is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from promptmux_kernels.vocabulary import log_normalisers, top_tokens
from promptmux_server.backbone.config import EOS, PAD
from promptmux_server.engine.decoding.protocol import Step, check_finite
from promptmux_server.tasks.decoding import DecodingParams, Hypothesis, Outcome
from promptmux_server.tasks.trie import Trie


class BeamSearch:
    """`prefix` are the decoder ids before the first generated token; n-gram blocking sees them too."""

    def __init__(self, params: DecodingParams, trie: Trie | None, prefix: Sequence[int]) -> None:
        self.width = params.beam_size if params.method == "beam" else 1
        self.most_tokens = self.width * params.max_length
        self._params, self._trie, self._prefix = params, trie, tuple(prefix)
        self._tokens: list[tuple[int, ...]] = [()]
        self._scores: list[tuple[float, ...]] = [()]
        """Cumulative scores of the live beams after each of their tokens."""
        self._finished: list[Hypothesis] = []

    @property
    def tokens(self) -> tuple[int, ...] | None:
        return self._tokens[0] if self.width == 1 else None

    def advance(self, logits: Tensor) -> Step | None:
        check_finite(logits)
        step = len(self._tokens[0])
        if self._trie is not None:
            logits = self._trie.restrict(logits, self._tokens)
        if self._params.temperature != 1.0:
            logits = logits / self._params.temperature
        normalisers = log_normalisers(logits)
        self._exclude(logits, step)
        before = torch.tensor([scores[-1] if scores else 0.0 for scores in self._scores], device=logits.device)
        best, where = top_tokens(logits, normalisers, before, min(2 * self.width, logits.numel() - 1))
        vocabulary = logits.shape[1]
        found = [
            (score, place // vocabulary, place % vocabulary)
            for score, place in zip(best.tolist(), where.tolist(), strict=True)
            if score != -torch.inf
        ]
        for score, row, token in found[: self.width]:
            if token == EOS:
                self._finish(row, score)
        alive = [entry for entry in found if entry[2] != EOS][: self.width]
        if len(self._finished) >= self.width or step >= self._params.max_length or not alive:
            return None
        self._tokens = [(*self._tokens[row], token) for _, row, token in alive]
        self._scores = [(*self._scores[row], score) for score, row, _ in alive]
        return Step(tuple(token for _, _, token in alive), tuple(row for _, row, _ in alive))

    def _exclude(self, logits: Tensor, step: int) -> None:
        """Give -inf to what may not come next, in place; the normaliser has counted it."""
        logits[:, PAD] = -torch.inf
        if step >= self._params.max_length:
            logits[:, :EOS] = -torch.inf
            logits[:, EOS + 1 :] = -torch.inf
        elif step < self._params.min_length:
            logits[:, EOS] = -torch.inf
        if self._params.no_repeat_ngram:
            for row, tokens in enumerate(self._tokens):
                logits[row, self._repeating((*self._prefix, *tokens))] = -torch.inf

    def _repeating(self, tokens: tuple[int, ...]) -> list[int]:
        """Tokens that would complete an n-gram that is there already."""
        n = self._params.no_repeat_ngram
        tail = tokens[len(tokens) - n + 1 :]
        return [tokens[i + n - 1] for i in range(len(tokens) - n + 1) if tokens[i : i + n - 1] == tail]

    def _finish(self, row: int, score: float) -> None:
        if len(self._finished) >= self.width:
            return
        cumulative = (*self._scores[row], score)
        steps = tuple(b - a for a, b in zip((0.0, *cumulative), cumulative, strict=False))
        tokens = (*self._tokens[row], EOS)
        final = score / len(tokens) ** self._params.length_penalty if self._params.normalize else score
        self._finished.append(Hypothesis(tokens, final, steps))

    def outcome(self) -> Outcome:
        return Outcome(tuple(sorted(self._finished, key=lambda hypothesis: -hypothesis.score)))
