"""CIDEr-D of captions (Vedantam et al. 2015): how much of what people say of a picture, and of few others, is said.

As pycocoevalcap computes what it calls CIDEr: n-grams of 1 to 4 words, weighted by how few pictures' references have
them, so a score holds for its set of pictures alone. Knows no model and no files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

ORDERS = 4
SIGMA = 6.0
"""Of the Gaussian that lowers the score of a caption longer or shorter than its reference, in words."""
HIGHEST = 10.0
"""Of a caption that is its only reference, where each of its n-grams is rarer than all pictures."""

Ngram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """A caption's weighted n-grams, order by order, with their norms and its length in words."""

    weights: Sequence[Mapping[Ngram, float]]
    norms: Sequence[float]
    words: int


def cider_d(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """Each picture's score, 0 to 10, of one caption against its references, all of them split into words.

    The corpus score is the mean. An n-gram that every picture's references hold weighs nothing: where all pictures have
    the same references, or there is only one picture, every score is 0.
    """
    counted = [[_ngrams(words) for words in texts] for texts in references]
    pictures_with = Counter(gram for texts in counted for gram in {gram for text in texts for gram in text})
    rarest = math.log(len(references))

    def weighed(grams: Mapping[Ngram, int]) -> _Vector:
        weights: list[dict[Ngram, float]] = [{} for _ in range(ORDERS)]
        for gram, count in grams.items():
            weights[len(gram) - 1][gram] = count * (rarest - math.log(max(1, pictures_with[gram])))
        norms = [math.sqrt(sum(weight**2 for weight in order.values())) for order in weights]
        return _Vector(weights, norms, sum(count for gram, count in grams.items() if len(gram) == 1))

    return [
        _mean(_similarity(said, weighed(text)) for text in texts) * HIGHEST
        for said, texts in zip((weighed(_ngrams(words)) for words in captions), counted, strict=True)
    ]


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def _similarity(said: _Vector, wanted: _Vector) -> float:
    """Cosine of each order, averaged; what is said more often than wanted is clipped, and the lengths should agree."""
    cosines = (
        sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in own.items() if gram in theirs) / (a * b)
        if a and b
        else 0.0
        for own, theirs, a, b in zip(said.weights, wanted.weights, said.norms, wanted.norms, strict=True)
    )
    return _mean(cosines) * math.exp(-((said.words - wanted.words) ** 2) / (2 * SIGMA**2))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
