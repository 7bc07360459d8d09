"""An endless stream of samples from several sources in shuffled order, each sample found by its number alone.

So a place in the data is two numbers, resuming is looking there, and any worker can take any rows. Knows no tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from promptmux_server.errors import DataError
from promptmux_server.training.batch import Cursor
from promptmux_server.training.data.sample import Place, Sample
from promptmux_server.training.data.shuffle import Shuffled
from promptmux_server.training.data.survey import Rows

TURNS = 1000
"""Draws in which each source has exactly its share, rounded; the order of the turns is shuffled too."""


class Stream:
    """Sources mixed by weights. An epoch is as many samples as all sources hold together.

    Each source goes through all of its samples, in an order of its own for every time, before any comes again.
    """

    def __init__(self, sources: Sequence[Rows], seed: int, weights: Sequence[float] | None = None) -> None:
        """Without weights a source counts by its size, but has one turn in a thousand at least.

        Raises DataError for a weight that is less, and for more sources than turns.
        """
        self._sources, self._seed = tuple(sources), seed
        self._quotas = _by_weight(weights) if weights else _by_size([len(rows) for rows in sources])
        self.epoch_samples = sum(len(rows) for rows in sources)
        # Of this stream alone; as decorators they would keep every stream alive.
        self._turns = lru_cache(4)(self._make_turns)
        self._order = lru_cache(4 * len(self._sources))(self._make_order)

    @property
    def sources(self) -> Sequence[Rows]:
        return self._sources

    @property
    def digest(self) -> str:
        """sha256 over all that decides which lines come when, wherever the files lie; a run goes on only on its own."""
        sha = hashlib.sha256(f"{self._seed} {self._quotas}".encode())
        for rows in self._sources:
            sha.update(f" {rows.source.sha256} {len(rows)} ".encode())
            sha.update(np.ascontiguousarray(rows.lines).data)
        return sha.hexdigest()

    def number(self, cursor: Cursor) -> int:
        """How many samples come before a cursor `{"epoch", "position"}` (None: before the first); raises DataError."""
        match cursor:
            case None:
                return 0
            case {"epoch": int(epoch), "position": int(position)} if epoch >= 0 and 0 <= position < self.epoch_samples:
                return epoch * self.epoch_samples + position
        raise DataError("The place in the data does not fit them: the data were changed since training stopped.")

    def cursor(self, number: int) -> Cursor:
        """The cursor in front of a sample."""
        epoch, position = divmod(number, self.epoch_samples)
        return {"epoch": epoch, "position": position}

    def sample(self, number: int) -> Sample:
        """Raises DataError."""
        source, row = self.place(number)
        return self._sources[source].sample(row)

    def where(self, number: int, entry: str | None = None) -> Place:
        """Where a sample stands in its file."""
        source, row = self.place(number)
        rows = self._sources[source]
        return rows.source.place(int(rows.lines[row]), entry)

    def place(self, number: int) -> tuple[int, int]:
        """(source, row) of a sample."""
        block, turn = divmod(number, TURNS)
        source, before = self._turns(block)[turn]
        time, position = divmod(block * self._quotas[source] + before, len(self._sources[source]))
        return source, self._order(source, time)[position]

    def _make_turns(self, block: int) -> list[tuple[int, int]]:
        """For each turn of a block, whose it is, and how many turns of the block that source had before."""
        owners = [source for source, quota in enumerate(self._quotas) for _ in range(quota)]
        order, had = Shuffled(TURNS, self._seed, "turns", block), Counter[int]()
        turns = []
        for position in range(TURNS):
            source = owners[order[position]]
            turns.append((source, had[source]))
            had[source] += 1
        return turns

    def _make_order(self, source: int, time: int) -> Shuffled:
        return Shuffled(len(self._sources[source]), self._seed, "rows", source, time)


def _by_weight(weights: Sequence[float]) -> list[int]:
    """Turns of each source in a block, as its weight says."""
    if min(weights) <= 0 or min(weights) / sum(weights) < 1 / TURNS:
        raise DataError(f"A source's weight must be above 0, and at least one in {TURNS} of all weights.")
    return _quotas(weights)


def _by_size(sizes: Sequence[int]) -> list[int]:
    """Turns of each source in a block; one that is too small for any takes one of the source that has most."""
    if len(sizes) > TURNS:
        raise DataError(f"At most {TURNS} files can be mixed: join some of them.")
    quotas = _quotas(sizes)
    for source, quota in enumerate(quotas):
        if quota == 0:
            quotas[quotas.index(max(quotas))] -= 1
            quotas[source] = 1
    return quotas


def _quotas(weights: Sequence[float]) -> list[int]:
    """Turns of each source in a block, by largest remainder."""
    total = sum(weights)
    exact = [weight / total * TURNS for weight in weights]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: quotas[source] - exact[source])
    for source in by_remainder[: TURNS - sum(quotas)]:
        quotas[source] += 1
    return quotas
