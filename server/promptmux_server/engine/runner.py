"""The running batch on the model: requests join it after their encoder pass and leave it at any step.

Owns the tensors between steps. A row that turns non-finite fails alone; a batch that does not fit into the device's
memory is halved until it does. Knows nothing of queues, deadlines or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from promptmux_kernels import FILL, PromptBatch, Rows
from promptmux_server.backbone.cache import DecodeCache
from promptmux_server.backbone.decoder import BeamRows
from promptmux_server.backbone.encoder import EncoderRow, ImageTokens
from promptmux_server.backbone.memory_pool import MemoryPool
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.positions import Grid
from promptmux_server.engine.decoding.protocol import NonFiniteLogits, Search, Step
from promptmux_server.engine.device_faults import in_parts_that_fit
from promptmux_server.engine.memory import Claim, DecodingMemory
from promptmux_server.engine.request import MemoryStats

Slots = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class BatchPrompts:
    """The prompts of a batch, row by row, for both sides of the model."""

    encoder: PromptBatch
    decoder: PromptBatch


class PromptSource(Protocol):
    """Where a batch's prompts lie: `batch` is asked with the `prompt` of each row's work."""

    def batch(self, rows: Sequence[Any], /) -> BatchPrompts: ...


@dataclass(frozen=True)
class Work:
    """One request as the model sees it: source ids (bos ... eos), decoder prefix (bos ...), picture, search.

    Work that is `alone` shares no product with another: its numbers are the same bits whoever runs beside it.
    """

    source: tuple[int, ...]
    prefix: tuple[int, ...]
    image: ImageTokens | None
    search: Search
    prompt: Any = None
    alone: bool = False

    @property
    def memory_length(self) -> int:
        """Tokens of its encoder row."""
        return len(self.source) + (len(self.image.tokens) if self.image else 0)

    @property
    def slots(self) -> int:
        """The most decode cache slots it can use."""
        return len(self.prefix) + self.search.most_tokens


@dataclass(eq=False)
class _Live:
    """A request in the batch: how many of its slots are used, its beams' ancestors (rows, t), the tokens to feed."""

    row: int
    work: Work
    claim: Claim
    grid: Grid
    used: int = 0
    history: Slots = field(default_factory=lambda: np.zeros((1, 0), dtype=np.int64))
    step: Step | None = None

    def next_slots(self, number: int) -> Slots:
        """The slots that a step of so many tokens fills; `keep` makes it final, so that a step may be tried again."""
        return np.array(self.claim.slots[self.used : self.used + number], dtype=np.int64)

    def grown(self) -> Slots:
        """The ancestors (rows, t + 1) of the beams that run next, their own new slots last."""
        assert self.step is not None
        return np.column_stack([self.history[list(self.step.parents)], self.next_slots(len(self.step.tokens))])

    def keep(self, history: Slots, new: int) -> None:
        self.history, self.used = history, self.used + new


class RunningBatch:
    """Requests between their encoder pass and their last token, each known by its row number."""

    def __init__(self, model: OFA, prompts: PromptSource, size: MemoryStats) -> None:
        self._model, self._prompts = model, prompts
        self._cache = DecodeCache(model.config, size.slots, dtype=model.dtype, device=model.device)
        self._pool = MemoryPool(model.config, size.places, dtype=model.dtype, device=model.device)
        self._live: dict[int, _Live] = {}
        self._finished: list[int] = []
        self._failed: dict[int, Exception] = {}

    @property
    def live_rows(self) -> list[int]:
        return list(self._live)

    @property
    def beams(self) -> int:
        """Rows of the next step's products."""
        return sum(len(entry.step.tokens) for entry in self._live.values() if entry.step)

    def take_finished(self) -> list[int]:
        """Rows whose search ended since the last call."""
        rows, self._finished = self._finished, []
        return rows

    def take_failed(self) -> dict[int, Exception]:
        """Rows that failed since the last call: NonFiniteLogits, or the device's out-of-memory error."""
        rows, self._failed = self._failed, {}
        return rows

    def join(self, entries: Sequence[tuple[int, Work, Claim]]) -> None:
        """Encode, run every decoder prefix and choose first tokens; each brings a row number of its own.

        What it claimed must stay its own until its row has finished, failed or been dropped.
        """
        fresh = [_Live(row, work, claim, EncoderRow(work.source, work.image).grid) for row, work, claim in entries]
        self._live.update((entry.row, entry) for entry in fresh)
        self._in_parts(fresh, self._prefill)

    def step(self) -> None:
        """Feed one token per live beam of every request."""
        self._in_parts(list(self._live.values()), self._step)

    def drop(self, rows: set[int]) -> None:
        """Stop computing those of these rows that are live; the others are not affected."""
        for row in rows:
            self._live.pop(row, None)

    # -- parts ------------------------------------------------------------------------------------------------------

    def _in_parts(self, entries: Sequence[_Live], run: Callable[[Sequence[_Live]], Tensor]) -> None:
        """Run what may share a product together and the rest one by one, then let every search advance."""
        together = [entry for entry in entries if not entry.work.alone]
        for part in [together, *([entry] for entry in entries if entry.work.alone)]:
            if part:
                in_parts_that_fit(part, run, self._advance, self._fail)

    def _prefill(self, part: Sequence[_Live]) -> Tensor:
        """Logits (B, V) behind every row's decoder prefix."""
        works = [entry.work for entry in part]
        prompts = self._prompts.batch([work.prompt for work in works])
        encoded = self._model.encode([EncoderRow(work.source, work.image) for work in works], prompts.encoder)
        memory = self._model.remember(encoded)
        self._pool.keep(memory, [entry.claim.start for entry in part])
        lengths = [len(work.prefix) for work in works]
        slots = [entry.next_slots(length) for entry, length in zip(part, lengths, strict=True)]
        flat = torch.from_numpy(np.concatenate(slots)).to(self._model.device)
        states = self._model.teach([work.prefix for work in works], memory, prompts.decoder, (self._cache, flat))
        ends = torch.tensor(lengths, device=states.device).cumsum(0) - 1
        logits = self._model.logits(states[ends])
        for entry, own in zip(part, slots, strict=True):
            entry.keep(own[None], len(own))
        return logits

    def _step(self, part: Sequence[_Live]) -> Tensor:
        """Logits (R, V) of every beam after the token that its search chose."""
        histories = [entry.grown() for entry in part]
        device = self._model.device
        beams = BeamRows(
            tokens=torch.tensor([token for entry in part if entry.step for token in entry.step.tokens], device=device),
            groups=Rows.packed([len(history) for history in histories]),
            history=torch.from_numpy(_padded(histories)).to(device),
            lengths=tuple(history.shape[1] for history in histories),
        )
        memory = self._pool.view(
            [entry.claim.start for entry in part],
            [entry.claim.length for entry in part],
            [entry.grid for entry in part],
        )
        prompts = self._prompts.batch([entry.work.prompt for entry in part]).decoder
        logits = self._model.logits(self._model.step(beams, memory, self._cache, prompts))
        for entry, history in zip(part, histories, strict=True):
            entry.keep(history, len(history))
        return logits

    def _advance(self, part: Sequence[_Live], logits: Tensor) -> None:
        widths = [1 if entry.step is None else len(entry.step.tokens) for entry in part]
        for entry, own in zip(part, logits.split(widths), strict=True):
            try:
                entry.step = entry.work.search.advance(own)
            except NonFiniteLogits as error:
                self._fail(entry, error)
                continue
            if entry.step is None:
                self.drop({entry.row})
                self._finished.append(entry.row)

    def _fail(self, entry: _Live, error: Exception) -> None:
        self.drop({entry.row})
        self._failed[entry.row] = error


def _padded(histories: Sequence[Slots]) -> Slots:
    """Histories (rows, t) of several requests -> (all rows, longest t); what is padded is never read."""
    padded = np.zeros((sum(map(len, histories)), max(history.shape[1] for history in histories)), dtype=np.int64)
    start = 0
    for history in histories:
        padded[start : start + len(history), : history.shape[1]] = history
        start += len(history)
    return padded


@dataclass(frozen=True)
class FixedPrompts:
    """The prompts of a batch that nobody joins later; a work's `prompt` is its row there."""

    prompts: BatchPrompts

    def batch(self, rows: Sequence[int], /) -> BatchPrompts:
        return BatchPrompts(self.prompts.encoder.select(rows), self.prompts.decoder.select(rows))


def closed_batch(model: OFA, works: Sequence[Work], prompts: BatchPrompts) -> RunningBatch:
    """A batch of exactly these requests, joined as rows 0, 1, ..., with memory for exactly them."""
    memory = DecodingMemory(sum(work.slots for work in works), sum(work.memory_length + FILL for work in works))
    batch = RunningBatch(model, FixedPrompts(prompts), memory.stats())
    entries = []
    for row, work in enumerate(works):
        claim = memory.claim(work.slots, work.memory_length)
        assert claim
        entries.append((row, replace(work, prompt=row), claim))
    batch.join(entries)
    return batch
