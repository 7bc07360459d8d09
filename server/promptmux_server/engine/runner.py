"""From admitted work to outcomes on the model: stem, encoder, prefill, then one step of every live beam at a time.

Owns the tensors of a running batch. A row that turns non-finite fails alone; rows leave as they finish. Knows nothing
of queues, deadlines or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from promptmux_kernels import PromptBatch, Rows
from promptmux_server.backbone.cache import DecodeCache
from promptmux_server.backbone.decoder import BeamRows, Memory
from promptmux_server.backbone.encoder import EncoderRow, ImageTokens
from promptmux_server.backbone.model import OFA
from promptmux_server.engine.decoding.protocol import NonFiniteLogits, Search, Step


@dataclass(frozen=True)
class Work:
    """One request as the model sees it: source ids (bos ... eos), decoder prefix (bos ...), picture, search."""

    source: tuple[int, ...]
    prefix: tuple[int, ...]
    image: ImageTokens | None
    search: Search


@dataclass(frozen=True)
class BatchPrompts:
    """The prompts of a batch, row by row, for both sides of the model."""

    encoder: PromptBatch
    decoder: PromptBatch


@dataclass
class _Live:
    """A request still decoding: its row in the batch, its beams' ancestors (rows, t), the tokens to feed next."""

    row: int
    history: Tensor
    step: Step


class RunningBatch:
    """A batch between its encoder pass and its last beam."""

    def __init__(self, model: OFA, works: Sequence[Work], prompts: BatchPrompts) -> None:
        self.works = tuple(works)
        self._finished: list[int] = []
        self._failed: list[int] = []
        self._model = model
        self._prompts = prompts
        rows = [EncoderRow(work.source, work.image) for work in works]
        self._memory: Memory = model.remember(model.encode(rows, prompts.encoder))
        self._cache: DecodeCache = model.new_cache()
        self._live: list[_Live] = []

    @property
    def live_rows(self) -> list[int]:
        return [live.row for live in self._live]

    def take_finished(self) -> list[int]:
        """Rows whose search ended since the last call."""
        rows, self._finished = self._finished, []
        return rows

    def take_failed(self) -> list[int]:
        """Rows whose logits turned non-finite since the last call."""
        rows, self._failed = self._failed, []
        return rows

    def prefill(self) -> None:
        """Run every row's decoder prefix and let its search choose the first tokens."""
        lengths = [len(work.prefix) for work in self.works]
        slots = self._cache.allocate(sum(lengths))
        states = self._model.teach(
            [work.prefix for work in self.works], self._memory, self._prompts.decoder, (self._cache, slots)
        )
        ends = torch.tensor(lengths, device=states.device).cumsum(0) - 1
        logits = self._model.logits(states[ends]).float()  # (B, V)
        for row, history in enumerate(slots.split(lengths)):
            self._advance(row, history[None], logits[row : row + 1])

    def step(self) -> None:
        """Feed one token per live beam of every live request."""
        live, self._live = self._live, []
        widths = [len(entry.step.tokens) for entry in live]
        groups = Rows.packed(widths)
        new = self._cache.allocate(groups.total).split(widths)
        histories = []
        for entry, slots in zip(live, new, strict=True):
            parents = torch.tensor(entry.step.parents, device=slots.device)
            histories.append(torch.cat([entry.history[parents], slots[:, None]], dim=1))
        tokens = [token for entry in live for token in entry.step.tokens]
        rows = [entry.row for entry in live]
        beams = BeamRows(
            tokens=torch.tensor(tokens, device=self._model.device),
            groups=groups,
            history=_pad_histories(histories),
            lengths=tuple(history.shape[1] for history in histories),
        )
        prompts = self._prompts.decoder.select(rows)
        states = self._model.step(beams, self._memory.select(rows), self._cache, prompts)
        logits = self._model.logits(states).float()  # (R, V)
        for row, history, own in zip(rows, histories, logits.split(widths), strict=True):
            self._advance(row, history, own)

    def drop(self, rows: set[int]) -> None:
        """Stop computing these rows; the others are not affected."""
        self._live = [entry for entry in self._live if entry.row not in rows]

    def _advance(self, row: int, history: Tensor, logits: Tensor) -> None:
        try:
            step = self.works[row].search.advance(logits)
        except NonFiniteLogits:
            self._failed.append(row)
            return
        if step is None:
            self._finished.append(row)
        else:
            self._live.append(_Live(row, history, step))


def _pad_histories(histories: Sequence[Tensor]) -> Tensor:
    """Histories (rows, t) of several requests -> (all rows, longest t); what is padded is never read."""
    longest = max(history.shape[1] for history in histories)
    return torch.cat([torch.nn.functional.pad(history, (0, longest - history.shape[1])) for history in histories])
