"""Who holds which part of the decoding memory: slots for decoded tokens, places for what the encoder said.

A request claims the most it can need before it starts and gives it back when it ends, so that no running request ever
waits for memory. Pure Python; the tensors are `backbone.cache`'s.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from promptmux_kernels import FILL
from promptmux_server.engine.request import MemoryStats


@dataclass(frozen=True, eq=False)
class Claim:
    """Memory of one request: `slots` of the decode cache, `length` places of the memory pool from `start` on."""

    slots: tuple[int, ...]
    start: int
    length: int


class DecodingMemory:
    """Hands out slots and places; used by the engine's thread alone."""

    def __init__(self, slots: int, places: int) -> None:
        self._slots, self._places = slots, places // FILL * FILL
        self._free = list(range(slots - 1, -1, -1))
        self._gaps = [(0, self._places)] if self._places else []
        """Free places as (start, stop), in order, never touching."""
        self._held: set[Claim] = set()

    def fits(self, slots: int, length: int) -> bool:
        """Whether such a claim can be met at all, were nothing else held."""
        return slots <= self._slots and _filled(length) <= self._places

    def claim(self, slots: int, length: int) -> Claim | None:
        """Slots and a piece of places, or None while others hold too much."""
        if slots > len(self._free):
            return None
        need = _filled(length)
        for index, (start, stop) in enumerate(self._gaps):
            if stop - start >= need:
                self._gaps[index : index + 1] = [(start + need, stop)] if stop - start > need else []
                break
        else:
            return None
        claim = Claim(tuple(self._free.pop() for _ in range(slots)), start, length)
        self._held.add(claim)
        return claim

    def release(self, claim: Claim) -> None:
        self._held.remove(claim)
        self._free.extend(claim.slots)
        insort(self._gaps, (claim.start, claim.start + _filled(claim.length)))
        merged: list[tuple[int, int]] = []
        for start, stop in self._gaps:
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        self._gaps = merged

    def stats(self) -> MemoryStats:
        free = sum(stop - start for start, stop in self._gaps)
        return MemoryStats(self._slots - len(self._free), self._slots, self._places - free, self._places)


def _filled(length: int) -> int:
    """Every layout of a memory row fits into a multiple of `FILL` places."""
    return -(-length // FILL) * FILL
