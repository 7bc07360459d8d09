"""How many items the API holds at one time, counted before anything of them is decoded.

A burst must not cost pictures that are refused afterwards. The engine's own queue is stricter and fairer; this count is
the cheap one in front of it. For the event loop's thread only: nothing here takes a lock.
"""

from __future__ import annotations

from collections import Counter

from promptmux_server.errors import Overloaded, TenantQueueFull


class Admission:
    """Counts of all items and of each key's; `per_key` does not bind callers without a key, who all are one."""

    def __init__(self, total: int, per_key: int) -> None:
        self._total, self._per_key = total, per_key
        self._held: Counter[str] = Counter()

    def enter(self, key: str, count: int) -> Place:
        """Admit `count` items of a key; raises TenantQueueFull before Overloaded, and then counts nothing."""
        if key and self._held[key] + count > self._per_key:
            raise TenantQueueFull("This key's share of the queue is full. Retry after the given time.")
        if self._held.total() + count > self._total:
            raise Overloaded("The server's queue is full. Retry after the given time.")
        self._held[key] += count
        return Place(self._held, key, count)


class Place:
    """The admitted items of one call, until `leave`; leaving twice is leaving once."""

    def __init__(self, held: Counter[str], key: str, count: int) -> None:
        self._held, self._key, self._count = held, key, count

    def leave(self) -> None:
        self._held[self._key] -= self._count
        self._count = 0
        if not self._held[self._key]:
            del self._held[self._key]
