"""Who waits and who goes next: a bounded queue that hands out batches. Pure Python, no torch, no clock of its own.

Owns admission and order. Knows nothing of what a ticket holds beyond being waited for.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

from promptmux_server.errors import Draining, Overloaded

Ticket = TypeVar("Ticket")


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

    def take(self, most: int) -> list[Ticket]:
        """Wait for tickets and return up to `most` of them in order; an empty list means closed and drained."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

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
