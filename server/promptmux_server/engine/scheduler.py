"""Who waits and who goes next: a bounded queue that hands out batches. Pure Python, no torch, no clock of its own.

Owns admission and order. Knows nothing of what a ticket holds beyond being waited for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from promptmux_server.errors import Draining, Overloaded

Ticket = TypeVar("Ticket")

RECHECK_S = 0.05
"""How often tickets that wait for their prompts are looked at, in case their deadlines pass."""


class AdmissionQueue(Generic[Ticket]):
    """First in, first out, at most `capacity` waiting; safe to use from many threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, ticket: Ticket) -> None:
        """Admit a ticket; raises `Overloaded` when the queue is full and `Draining` after `close`."""
        with self._changed:
            if self._closed:
                raise Draining("The server is shutting down. Send the request to another replica.", retry_after_s=5)
            if len(self._waiting) >= self._capacity:
                raise Overloaded("The server's queue is full. Retry after the given time.", retry_after_s=1)
            self._waiting.append(ticket)
            self._changed.notify()

    def take(self, most: int, may_leave: Callable[[Ticket], bool]) -> list[Ticket]:
        """Wait for tickets that may leave and return up to `most` of them in order; none means closed and drained.

        `may_leave` is asked of each in turn, under the queue's lock, until enough have said yes; those leave for good.
        """
        with self._changed:
            while self._waiting or not self._closed:
                taken: list[Ticket] = []
                staying: deque[Ticket] = deque()
                while self._waiting and len(taken) < most:
                    ticket = self._waiting.popleft()
                    (taken if may_leave(ticket) else staying).append(ticket)
                self._waiting.extendleft(reversed(staying))
                if taken:
                    return taken
                self._changed.wait(RECHECK_S if self._waiting else None)
            return []

    def wake(self) -> None:
        """Some ticket may leave now that could not before."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Refuse new tickets; those already waiting are still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[Ticket]:
        """Remove and return everything that waits."""
        with self._changed:
            rest = list(self._waiting)
            self._waiting.clear()
            return rest
