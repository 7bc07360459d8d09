"""What one run learns from in one pass, and where such batches come from.

Owns the nouns and the answer sets' masks; knows no file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.model import OFA
from promptmux_server.tasks.trie import Trie
from promptmux_server.training.forward import Example

Cursor = int | float | str | bool | None | list["Cursor"] | dict[str, "Cursor"]
"""A place in a run's data, as a JSON value; None is the beginning."""

Picture = ImageTokens | Tensor
"""What the frozen stem said of a picture, or its normalised pixels (3, S, S')."""


@dataclass(frozen=True)
class TrainingBatch:
    """Examples and the pictures that they index."""

    examples: Sequence[Example]
    pictures: Sequence[Picture]
    answers: Trie | None = None
    """A closed answer set confines the loss to what may follow at each position (ofa-spec 9.1, 9.2)."""

    def allowed(self, vocabulary: int) -> Tensor | None:
        """Symbols that each supervised position may choose from, (T, vocabulary) bool."""
        if self.answers is None:
            return None
        prefixes = [e.target[:length] for e in self.examples for length in range(len(e.target) + 1)]
        kinds = {prefix: index for index, prefix in enumerate(dict.fromkeys(prefixes))}
        masks = torch.zeros(len(kinds), vocabulary, dtype=torch.bool)
        for prefix, index in kinds.items():
            masks[index, list(self.answers.children(prefix))] = True
        return masks[[kinds[prefix] for prefix in prefixes]]

    def confidence(self) -> Tensor | None:
        """Each supervised position's confidence (T,), None where all are certain."""
        if all(e.confidence == 1.0 for e in self.examples):
            return None
        return torch.tensor([e.confidence for e in self.examples for _ in range(len(e.target) + 1)])


class Batches(Protocol):
    """A run's data: endless, and the same from the same cursor whenever it is asked."""

    def take(self, cursor: Cursor) -> tuple[TrainingBatch, Cursor]:
        """The batch at a cursor, and the cursor behind it."""
        ...


def seen(model: OFA, pictures: Sequence[Picture]) -> list[ImageTokens]:
    """Pass pixels through the model's stem, pictures of one size together; what was seen before stays as it is."""
    found: dict[int, ImageTokens] = {i: p for i, p in enumerate(pictures) if isinstance(p, ImageTokens)}
    by_size: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for index, picture in enumerate(pictures):
        if isinstance(picture, Tensor):
            by_size.setdefault(picture.shape, []).append((index, picture))
    for alike in by_size.values():
        tokens = model.image_tokens(torch.stack([pixels for _, pixels in alike]))
        found |= {index: token for (index, _), token in zip(alike, tokens, strict=True)}
    return [found[index] for index in range(len(pictures))]
