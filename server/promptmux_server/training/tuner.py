"""Prompt tuning in its simplest correct form: Adam on deep prompts in front of a frozen backbone (paper 1, ofa-spec 4).

Owns the parameters, their dropout, the optimiser and the schedule. Where batches come from is the caller's business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmux_kernels import PromptBatch, pack_prompts
from promptmux_prompts.importers.ofa import split_table
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.model import OFA
from promptmux_server.tasks.trie import Trie
from promptmux_server.training.forward import Example, supervised_logits
from promptmux_server.training.initial import initial_table, text_table
from promptmux_server.training.loss import label_smoothed_loss

log = logging.getLogger(__name__)

LOG_EVERY = 50

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class TuningRecipe:
    """Numbers of one run. Warm-up is a share of the steps; the rate then falls linearly to zero."""

    encoder_length: int = 32
    decoder_length: int = 32
    steps: int = 500
    learning_rate: float = 0.05
    """Above the paper's 0.03: in a few hundred steps noise of N(0, 0.02) must grow to the size of real keys."""
    warmup: float = 0.06
    prompt_dropout: float = 0.0
    """The released recipe has 0.2, which pays over 40 epochs and more, not over the few hundred steps used here."""
    smoothing: float = 0.0
    clip_norm: float = 1.0
    seed: int = 1

    def rate(self, step: int) -> float:
        """Learning rate of a step (from 0)."""
        warm = max(1, round(self.warmup * self.steps))
        return self.learning_rate * min(1.0, (step + 1) / warm) * max(0.0, (self.steps - step) / self.steps)


@dataclass(frozen=True)
class TuningBatch:
    """Examples and the pictures that they index."""

    examples: Sequence[Example]
    images: Sequence[ImageTokens]
    answers: Trie | None = None
    """A closed answer set confines the loss to what may follow at each position (ofa-spec 9.1, 9.2)."""

    def allowed(self, vocabulary: int) -> Tensor | None:
        """Symbols that each supervised position may choose from, (T, vocabulary) bool."""
        if self.answers is None:
            return None
        prefixes = [e.target[:depth] for e in self.examples for depth in range(len(e.target) + 1)]
        mask = torch.zeros(len(prefixes), vocabulary, dtype=torch.bool)
        for row, prefix in enumerate(prefixes):
            mask[row, list(self.answers.children(prefix))] = True
        return mask


class PromptTables(nn.Module):
    """One table (P, layers * 2 * d) a side; the encoder's may begin as a text's keys and values (see `initial`)."""

    def __init__(self, config: BackboneConfig, recipe: TuningRecipe, text: Tensor | None = None) -> None:
        super().__init__()
        self._heads, self._layers = config.heads, (config.encoder_layers, config.decoder_layers)
        self._dropout = recipe.prompt_dropout
        widths = [layers * 2 * config.d_model for layers in self._layers]
        encoder = initial_table(recipe.encoder_length, widths[0], recipe.seed, text)
        decoder = initial_table(recipe.decoder_length, widths[1], recipe.seed + 1)
        self.encoder, self.decoder = nn.Parameter(encoder), nn.Parameter(decoder)

    def sides(self) -> tuple[KeyValue, KeyValue]:
        """K and V of encoder and decoder, each (layers, H, P, D), as they are served."""
        return (
            split_table(self.encoder, self._layers[0], self._heads),
            split_table(self.decoder, self._layers[1], self._heads),
        )

    def batches(self, rows: int) -> tuple[PromptBatch, PromptBatch]:
        """The prompts as a batch of `rows` reads them; with dropout every row sees its own thinned copy."""
        encoder, decoder = (self._batch(side, rows) for side in self.sides())
        return encoder, decoder

    def _batch(self, side: KeyValue, rows: int) -> PromptBatch:
        if not self.training or self._dropout == 0.0:
            return pack_prompts([side], [0] * rows)
        copies = [(F.dropout(side[0], self._dropout), F.dropout(side[1], self._dropout)) for _ in range(rows)]
        return pack_prompts(copies, range(rows))


def tune(
    model: OFA, recipe: TuningRecipe, batches: Iterator[TuningBatch], text: Sequence[int] | None = None
) -> PromptTables:
    """Learn one prompt; the backbone is not touched. Raises ValueError if a parameter of the backbone would train.

    `text` (bos ... eos) lets the encoder's prompt begin as the keys and values of that text instead of noise.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the backbone is not frozen: call requires_grad_(False) first")
    torch.manual_seed(recipe.seed)
    begin = None if text is None else text_table(model, text)
    tables = PromptTables(model.config, recipe, begin).to(model.device).train()
    optimizer = torch.optim.Adam(tables.parameters(), lr=recipe.learning_rate)
    nll, tokens = 0.0, 0
    for step in range(recipe.steps):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        logits, targets = supervised_logits(model, batch.examples, batch.images, *tables.batches(len(batch.examples)))
        allowed = batch.allowed(logits.shape[1])
        allowed = None if allowed is None else allowed.to(logits.device)
        loss = label_smoothed_loss(logits, targets, smoothing=recipe.smoothing, allowed=allowed)
        loss.mean.backward()
        nn.utils.clip_grad_norm_(tables.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        nll, tokens = nll + float(loss.nll.detach()), tokens + loss.tokens
        if (step + 1) % LOG_EVERY == 0:
            log.info("step %d: nll %.4f", step + 1, nll / tokens)
            nll, tokens = 0.0, 0
    return tables.eval()
