"""Who waits and who goes next: first in, first out, bounded. Pure Python, no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from promptmux_server.errors import Draining, Overloaded

Ticket = TypeVar("Ticket")


@dataclass(frozen=True)
class Share:
    key: str
    task: str
    priority: Literal["interactive", "batch"]


class FairQueue(Generic[Ticket]):
    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: list[tuple[Ticket, float]] = []
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, ticket: Ticket, share: Share, cost_ms: float, deadline: float) -> None:
        with self._changed:
            if self._closed:
                raise Draining("The server is shutting down. Send the request to another replica.", retry_after_s=5)
            if len(self._waiting) >= self._capacity:
                raise Overloaded("The server's queue is full. Retry after the given time.", retry_after_s=1)
            self._waiting.append((ticket, deadline))
            self._changed.notify()

    def take(self, most: int, budget_ms: float, fits: Callable[[Ticket], bool]) -> list[Ticket]:
        with self._changed:
            taken: list[Ticket] = []
            for entry in list(self._waiting):
                if len(taken) < most and fits(entry[0]):
                    taken.append(entry[0])
                    self._waiting.remove(entry)
            return taken

    def wait(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait(timeout_s)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def discard(self, ticket: Ticket) -> bool:
        with self._changed:
            before = len(self._waiting)
            self._waiting = [entry for entry in self._waiting if entry[0] is not ticket]
            return len(self._waiting) < before

    def expire(self, now: float) -> list[Ticket]:
        with self._changed:
            late = [ticket for ticket, deadline in self._waiting if deadline < now]
            self._waiting = [entry for entry in self._waiting if entry[1] >= now]
            return late

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[Ticket]:
        with self._changed:
            rest = [ticket for ticket, _ in self._waiting]
            self._waiting.clear()
            return rest
