"""Who waits and who goes next: a bounded queue shared fairly between keys and tasks. Pure Python, no torch, no clock.

Owns admission, limits and deadlines; the order is `fair_order`'s. Knows nothing of what a ticket holds, nor whether its
prompt is on the device: the engine says what fits.
"""

from __future__ import annotations

import heapq
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

from promptmux_server.engine.fair_order import FairOrder, Look, Node, Path, Waiting
from promptmux_server.engine.request import Priority
from promptmux_server.errors import Draining, Overloaded, TenantQueueFull

Ticket = TypeVar("Ticket", bound=Hashable)

BATCH_FRACTION = 0.1
"""Of the device time, what batch work gets while interactive requests always wait; it takes all they leave."""
MAX_RETRY_AFTER_S = 30
RETRY_SPREAD_S = 3
"""Callers turned away together are told to come back over at least so many seconds."""


@dataclass(frozen=True)
class Share:
    """On whose account a ticket waits."""

    key: str
    """Name of the API key; "" where the server has none."""
    task: str
    priority: Priority = "interactive"

    @property
    def path(self) -> Path:
        """From the coarsest share to the finest."""
        return (self.priority, self.key, self.task)


@dataclass(frozen=True)
class QueueLimits:
    """Tickets that may wait at one time; a key's interactive and batch tickets are counted apart.

    A part as large as the total bounds nothing: only the total then refuses.
    """

    total: int
    per_key: int
    """Of one key. Callers without a key are all one, so this does not bound them: they may fill the queue."""
    per_task: int
    """Of one task within one key, so that no caller can use up a task for the others."""

    @property
    def batch(self) -> int:
        """Of all batch work together: half the queue stays for interactive requests."""
        return (self.total + 1) // 2


@dataclass(frozen=True, eq=False)
class _Admitted(Generic[Ticket]):
    """A ticket's account, its deadline, and where it waits."""

    share: Share
    deadline: float
    waiting: Waiting[Ticket]


class FairQueue(Generic[Ticket]):
    """Tickets of many shares, handed out fairly; safe to use from many threads.

    Interactive and batch work share the device by fixed weights, the keys within each by theirs, a key's tasks equally.
    Whoever waits gets its part whatever the others send, within one ticket of each; what nobody claims is shared.
    """

    def __init__(self, limits: QueueLimits, weights: Mapping[str, float], spread: random.Random) -> None:
        """`weights` by key name, 1.0 where there is none; `spread` varies Retry-After."""
        self._limits, self._weights, self._spread = limits, dict(weights), spread
        self._order: FairOrder[Ticket] = FairOrder(self._weight_of)
        self._admitted: dict[Ticket, _Admitted[Ticket]] = {}
        self._deadlines: list[tuple[float, int, _Admitted[Ticket]]] = []
        self._serial = count()
        self._closed = False
        self._lock = threading.Lock()
        # Not a condition of the lock: `wake` may come from whoever holds a lock that `fits` asks for.
        self._news = threading.Event()

    def __len__(self) -> int:
        return len(self._admitted)

    @property
    def drained(self) -> bool:
        """Closed, and nothing waits any more."""
        with self._lock:
            return self._closed and not self._admitted

    def depths(self) -> Counter[Share]:
        """How many tickets wait, for each share where any does."""
        with self._lock:
            return Counter(admitted.share for admitted in self._admitted.values())

    def put(
        self,
        ticket: Ticket,
        share: Share,
        cost_ms: float,
        deadline: float = math.inf,
        patience_ms: float = math.inf,
    ) -> None:
        """Admit a ticket of an estimated `cost_ms` (> 0); `deadline` is in the seconds that `expire` is given.

        Raises `TenantQueueFull` when a share of the caller's own is full, `Overloaded` when the queue is, `Draining`
        after `close`. What would wait longer than `patience_ms` is refused likewise: a queue of requests that are late
        when their turn comes does nobody any good.
        """
        with self._lock:
            self._check_room(share)
            self._check_patience(share, patience_ms)
            assert ticket not in self._admitted
            admitted = _Admitted(share, deadline, self._order.add(share.path, ticket, cost_ms))
            self._admitted[ticket] = admitted
            if deadline < math.inf:
                self._watch(admitted)
        self._news.set()

    def take(self, most: int, budget_ms: float, fits: Callable[[Ticket], bool]) -> list[Ticket]:
        """Hand out up to `most` tickets in fair order, without waiting; stops once their cost reaches `budget_ms`.

        The first is handed out whatever it costs. A ticket that does not fit now keeps its place. `fits` is asked at
        most once a ticket, under the queue's lock: it must return at once, and neither raise nor call the queue.
        """
        taken: list[Ticket] = []
        with self._lock:
            self._news.clear()
            with Look(self._order, fits) as look:
                while len(taken) < most and (budget_ms > 0 or not taken):
                    if (waiting := look.first()) is None:
                        return taken
                    self._order.serve(waiting)
                    del self._admitted[waiting.ticket]
                    taken.append(waiting.ticket)
                    budget_ms -= waiting.cost_ms
            if self._admitted:
                self._news.set()  # not all were looked at
        return taken

    def wait(self, timeout_s: float) -> bool:
        """Wait until a `take` may find what the last one did not, or all is `drained`; False when time ran out."""
        return self.drained or self._news.wait(timeout_s)

    def wake(self) -> None:
        """What fits has changed: end the present or the next `wait`. Takes no lock of the queue's."""
        self._news.set()

    def charge(self, share: Share, extra_ms: float) -> None:
        """Add to what a share has had: by how much a ticket cost more than was estimated, or less."""
        with self._lock:
            self._order.charge(share.path, extra_ms)

    def discard(self, ticket: Ticket) -> bool:
        """Remove a ticket, uncharged; False if it does not wait here (any more)."""
        with self._lock:
            admitted = self._admitted.pop(ticket, None)
            if admitted is not None:
                self._order.remove(admitted.waiting)
        if admitted is not None:
            self._news.set()  # it may have been the last that a closed queue waited for
        return admitted is not None

    def expire(self, now: float) -> list[Ticket]:
        """Remove and return the tickets whose deadline has passed at `now`, uncharged, the earliest first."""
        expired: list[Ticket] = []
        with self._lock:
            while self._deadlines and self._deadlines[0][0] < now:
                admitted = heapq.heappop(self._deadlines)[-1]
                ticket = admitted.waiting.ticket
                if self._admitted.get(ticket) is admitted:
                    del self._admitted[ticket]
                    self._order.remove(admitted.waiting)
                    expired.append(ticket)
        if expired:
            self._news.set()
        return expired

    def until_next_deadline(self, now: float) -> float:
        """Seconds from `now` until `expire` may find something; never negative, infinite if it will not."""
        with self._lock:
            return max(0.0, self._deadlines[0][0] - now) if self._deadlines else math.inf

    def close(self) -> None:
        """Refuse new tickets; those already waiting are still handed out."""
        with self._lock:
            self._closed = True
        self._news.set()

    def clear(self) -> list[Ticket]:
        """Remove and return everything that waits, in the order of arrival."""
        with self._lock:
            rest = list(self._admitted)
            for admitted in self._admitted.values():
                self._order.remove(admitted.waiting)
            self._admitted.clear()
            self._deadlines.clear()
        self._news.set()
        return rest

    def _check_room(self, share: Share) -> None:
        if self._closed:
            raise Draining("The server is shutting down. Send the request to another replica.", retry_after_s=5)
        limits, path = self._limits, share.path
        bounds = [(path, limits.per_task, "this task")]
        if share.key:
            bounds.append((path[:2], limits.per_key, "your key"))
        if share.priority == "batch":
            bounds.append((path[:1], limits.batch, "batch work"))
        for part, bound, whose in bounds:
            node = self._order.find(part)
            if bound < limits.total and node is not None and node.count >= bound:
                message = f"The queue's part for {whose} is full. Retry after the given time."
                raise TenantQueueFull(message, retry_after_s=self._retry_after_s(node))
        if len(self._admitted) >= limits.total:
            wait_s = self._retry_after_s(self._order.root)
            raise Overloaded("The server's queue is full. Retry after the given time.", retry_after_s=wait_s)

    def _check_patience(self, share: Share, patience_ms: float) -> None:
        own = self._order.find(share.path)
        if own is None or own.drain_ms <= max(patience_ms, 0.0):
            return
        message = "What waits already would take longer than this request's deadline. Retry after the given time."
        kind = Overloaded if self._order.root.drain_ms > patience_ms and not share.key else TenantQueueFull
        raise kind(message, retry_after_s=self._retry_after_s(own))

    def _retry_after_s(self, node: Node[Ticket]) -> int:
        """When what waits here will have been served, and some seconds more for one caller than for another."""
        wait_s = max(1, math.ceil(node.drain_ms / 1000.0))
        earliest = min(wait_s, MAX_RETRY_AFTER_S * 2 // 3)  # room for the spread below the longest wait allowed
        return self._spread.randint(earliest, min(MAX_RETRY_AFTER_S, earliest + max(RETRY_SPREAD_S, earliest // 2)))

    def _watch(self, admitted: _Admitted[Ticket]) -> None:
        heapq.heappush(self._deadlines, (admitted.deadline, next(self._serial), admitted))
        if len(self._deadlines) > 2 * len(self._admitted) + 64:  # most of them have been handed out
            current = self._admitted
            self._deadlines = [entry for entry in self._deadlines if current.get(entry[-1].waiting.ticket) is entry[-1]]
            heapq.heapify(self._deadlines)

    def _weight_of(self, path: Path) -> float:
        if len(path) == 1:
            return BATCH_FRACTION if path[0] == "batch" else 1.0 - BATCH_FRACTION
        return self._weights.get(path[1], 1.0) if len(path) == 2 else 1.0
