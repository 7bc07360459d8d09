"""All-candidate scoring: the probability of every answer of a closed set (ofa-spec 9.3).

The answers' common beginnings are computed once: a step runs one row per node of the trie at one depth. Log-softmax is
over the tokens that may follow in the trie, so a node with a single continuation costs nothing: its probability is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from promptmux_server.backbone.config import EOS
from promptmux_server.engine.decoding.protocol import Step, check_finite
from promptmux_server.tasks.decoding import Hypothesis, Outcome
from promptmux_server.tasks.trie import trie_of

Path = tuple[int, ...]


class CandidateScoring:
    """Walks the trie breadth first; scores are sums of masked log-probabilities, eos included, not normalised."""

    tokens = None

    def __init__(self, candidates: tuple[Path, ...]) -> None:
        self._candidates = candidates
        self._trie = trie_of(candidates)
        self._rows: list[Path] = [()]
        self._steps: dict[Path, float] = {}
        """Log-probability of the last token of each path, given the tokens before it."""
        levels = [len(level) for level in self._levels()]
        self.width = max(1, *levels)
        self.most_tokens = sum(levels[1:])

    def _levels(self) -> list[set[Path]]:
        longest = max(len(answer) for answer in self._candidates)
        return [{answer[:depth] for answer in self._candidates if len(answer) >= depth} for depth in range(longest + 1)]

    def advance(self, logits: Tensor) -> Step | None:
        check_finite(logits)
        restricted = self._trie.restrict(logits, self._rows).log_softmax(-1)
        chosen = [(row, (*path, token)) for row, path in enumerate(self._rows) for token in self._trie.children(path)]
        index = torch.tensor([(row, path[-1]) for row, path in chosen], device=logits.device)
        values = restricted[index[:, 0], index[:, 1]].tolist()
        self._steps.update((path, value) for (_, path), value in zip(chosen, values, strict=True))
        following = [(row, path) for row, path in chosen if path[-1] != EOS and self._undecided(path)]
        self._rows = [path for _, path in following]
        if not following:
            return None
        return Step(tuple(path[-1] for path in self._rows), tuple(row for row, _ in following))

    def _undecided(self, path: Path) -> bool:
        """Whether anything but certainty lies behind a path."""
        children = self._trie.children(path)
        while len(children) == 1 and children[0] != EOS:
            path = (*path, children[0])
            children = self._trie.children(path)
        return children != (EOS,)

    def outcome(self) -> Outcome:
        scored = [self._score((*answer, EOS)) for answer in self._candidates]
        ranked = sorted(range(len(scored)), key=lambda i: -sum(scored[i]))
        hypotheses = tuple(
            Hypothesis((*self._candidates[i], EOS), sum(scored[i]), tuple(scored[i])) for i in ranked[:8]
        )
        return Outcome(hypotheses, tuple(sum(steps) for steps in scored))

    def _score(self, path: Path) -> list[float]:
        return [self._steps.get(path[: depth + 1], 0.0) for depth in range(len(path))]
