"""Sampling with temperature, top-k and top-p; each request has a generator of its own, so neighbours change nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from promptmux_server.backbone.config import EOS, PAD
from promptmux_server.engine.decoding.protocol import Step, check_finite
from promptmux_server.tasks.decoding import DecodingParams, Hypothesis, Outcome
from promptmux_server.tasks.trie import Trie


class Sampling:
    """One text, drawn token by token; with a seed the same logits draw the same text on any device."""

    width = 1

    def __init__(self, params: DecodingParams, trie: Trie | None) -> None:
        self._params, self._trie = params, trie
        self.most_tokens = params.max_length
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self.tokens: tuple[int, ...] = ()
        self._scores: tuple[float, ...] = ()

    def advance(self, logits: Tensor) -> Step | None:
        check_finite(logits)
        step = len(self.tokens)
        row = self._allowed(logits[0].cpu(), step)
        log_probs = row.log_softmax(-1)
        weights = self._truncated(log_probs).exp()
        token = int(torch.multinomial(weights, 1, generator=self._generator))
        self.tokens += (token,)
        self._scores += (float(log_probs[token]),)
        return None if token == EOS else Step((token,), (0,))

    def _allowed(self, logits: Tensor, step: int) -> Tensor:
        if self._trie is not None:
            logits = self._trie.restrict(logits[None], [self.tokens])[0]
        logits = logits / self._params.temperature
        if step >= self._params.max_length:
            return torch.full_like(logits, -torch.inf).index_fill_(0, torch.tensor(EOS), 0.0)
        logits[PAD] = -torch.inf
        if step < self._params.min_length and bool((logits[EOS + 1 :] > -torch.inf).any()):
            logits[EOS] = -torch.inf
        return logits

    def _truncated(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities with all but the top k, and all beyond a mass of p, removed."""
        ranked, order = log_probs.sort(descending=True)
        mass_before = ranked.exp().cumsum(0) - ranked.exp()
        cut = mass_before >= self._params.top_p
        if self._params.top_k:
            cut[self._params.top_k :] = True
        return torch.full_like(log_probs, -torch.inf).index_copy_(0, order, ranked.masked_fill(cut, -torch.inf))

    def outcome(self) -> Outcome:
        total = sum(self._scores)
        length = len(self.tokens) ** self._params.length_penalty
        score = total / length if self._params.normalize else total
        return Outcome((Hypothesis(self.tokens, score, self._scores),))
