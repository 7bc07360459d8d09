"""Fair order by virtual time: a tree of shares, in which whoever has had least for its weight goes next.

Owns the counters. A node counts the milliseconds it was charged, divided by its weight (start-time fair queueing, level
by level); its place among its siblings is that count. A node that begins to wait starts no earlier than its siblings'
virtual time, so having been idle earns nothing. Knows nothing of threads, clocks, limits or what a level stands for.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

Ticket = TypeVar("Ticket")
Path = tuple[str, ...]


@dataclass(eq=False)
class Node(Generic[Ticket]):
    """A share among its siblings. A leaf holds tickets, any other node holds children."""

    parent: Node[Ticket] | None
    weight: float = 1.0
    service_ms: float = 0.0
    """Charged so far, divided by the weight: virtual milliseconds of the parent."""
    now_ms: float = 0.0
    """Virtual time of the children: where the last one served stood before it was charged. Never decreases."""
    count: int = 0
    """Tickets that wait below this node."""
    cost_ms: float = 0.0
    """Estimated milliseconds of those tickets."""
    children: dict[str, Node[Ticket]] = field(default_factory=dict)
    order: list[_Place[Ticket]] = field(default_factory=list)
    """Heap of the children's places; those that are out of date are dropped when they come up."""
    place: _Place[Ticket] | None = None
    """This node's valid entry in the parent's `order`; None while nothing waits."""
    tickets: OrderedDict[Ticket, Waiting[Ticket]] = field(default_factory=OrderedDict)

    @property
    def lineage(self) -> Iterator[tuple[Node[Ticket], Node[Ticket]]]:
        """(node, parent) from this node up to the root."""
        node = self
        while node.parent is not None:
            yield node, node.parent
            node = node.parent

    @property
    def drain_ms(self) -> float:
        """When all that waits here now will have been served, if all shares that wait keep waiting."""
        wait_ms = self.cost_ms
        for node, parent in self.lineage:
            rivals = sum(sibling.weight for sibling in parent.children.values() if sibling.count)
            wait_ms = min(parent.cost_ms, wait_ms * rivals / node.weight)
        return wait_ms


_Place = tuple[float, float, int, Node[Ticket]]
"""(service_ms, -weight, serial, node): of equals the heavier goes first, then whoever came first."""


@dataclass(frozen=True, eq=False)
class Waiting(Generic[Ticket]):
    """A ticket in its place."""

    ticket: Ticket
    cost_ms: float
    leaf: Node[Ticket]


class FairOrder(Generic[Ticket]):
    """Tickets at the leaves of a tree of shares; adding, removing and picking cost O(log siblings)."""

    def __init__(self, weight_of: Callable[[Path], float]) -> None:
        """`weight_of` gives the weight (> 0) of the node at a path among its siblings."""
        self.root: Node[Ticket] = Node(None)
        self._weight_of = weight_of
        self._serial = count()

    def find(self, path: Path) -> Node[Ticket] | None:
        """The node at a path, if it is remembered."""
        node = self.root
        for name in path:
            if (child := node.children.get(name)) is None:
                return None
            node = child
        return node

    def add(self, path: Path, ticket: Ticket, cost_ms: float) -> Waiting[Ticket]:
        """Queue a ticket behind those of its leaf."""
        leaf = self._grow(path)
        waiting = Waiting(ticket, cost_ms, leaf)
        leaf.tickets[ticket] = waiting
        self.root.count += 1
        self.root.cost_ms += cost_ms
        for node, parent in leaf.lineage:
            node.count += 1
            node.cost_ms += cost_ms
            if node.count == 1:
                node.service_ms = max(node.service_ms, parent.now_ms)
                self._put_in_place(node, parent)
        return waiting

    def remove(self, waiting: Waiting[Ticket]) -> None:
        """Take a ticket out, uncharged."""
        del waiting.leaf.tickets[waiting.ticket]
        lineage = [waiting.leaf, *(parent for _, parent in waiting.leaf.lineage)]
        for node in lineage:
            node.count -= 1
            node.cost_ms -= waiting.cost_ms
            if node.count == 0:
                _rest(node)

    def serve(self, waiting: Waiting[Ticket]) -> None:
        """Take a ticket out and charge its cost to every share that it belongs to."""
        for node, parent in waiting.leaf.lineage:
            parent.now_ms = max(parent.now_ms, node.service_ms)
            self._charge(node, parent, waiting.cost_ms)
        self.remove(waiting)

    def charge(self, path: Path, extra_ms: float) -> None:
        """Correct what a path was charged; less than nothing gives back."""
        for node, parent in self._grow(path).lineage:
            self._charge(node, parent, extra_ms)

    def _grow(self, path: Path) -> Node[Ticket]:
        node = self.root
        for depth, name in enumerate(path, start=1):
            if name not in node.children:
                node.children[name] = Node(node, self._weight_of(path[:depth]), service_ms=node.now_ms)
            node = node.children[name]
        return node

    def _charge(self, node: Node[Ticket], parent: Node[Ticket], cost_ms: float) -> None:
        node.service_ms += cost_ms / node.weight
        if node.count:
            self._put_in_place(node, parent)

    def _put_in_place(self, node: Node[Ticket], parent: Node[Ticket]) -> None:
        node.place = (node.service_ms, -node.weight, next(self._serial), node)
        heapq.heappush(parent.order, node.place)
        if len(parent.order) > 2 * len(parent.children) + 16:
            parent.order = [place for place in parent.order if place[-1].place is place]
            heapq.heapify(parent.order)


class Look(Generic[Ticket]):
    """One look through the order: asks `fits` of a ticket at most once, and passes over those that do not.

    A context manager: at its end, whatever was passed over is back where it stood.
    """

    def __init__(self, order: FairOrder[Ticket], fits: Callable[[Ticket], bool]) -> None:
        self._root, self._fits = order.root, fits
        self._tickets: list[Waiting[Ticket]] = []
        self._places: list[tuple[Node[Ticket], _Place[Ticket]]] = []

    def __enter__(self) -> Look[Ticket]:
        return self

    def __exit__(self, *_: object) -> None:
        for waiting in reversed(self._tickets):
            waiting.leaf.tickets[waiting.ticket] = waiting
            waiting.leaf.tickets.move_to_end(waiting.ticket, last=False)
        for parent, place in self._places:
            heapq.heappush(parent.order, place)

    def first(self) -> Waiting[Ticket] | None:
        """The ticket that is next of those that fit; it stays until the order is told to serve it."""
        return self._first_below(self._root)

    def _first_below(self, node: Node[Ticket]) -> Waiting[Ticket] | None:
        while node.order:
            place = node.order[0]
            child = place[-1]
            if child.place is place:
                if (found := self._first_below(child)) is not None:
                    return found
                self._places.append((node, place))
            heapq.heappop(node.order)
        while node.tickets:
            ticket, waiting = next(iter(node.tickets.items()))
            if self._fits(ticket):
                return waiting
            self._tickets.append(node.tickets.popitem(last=False)[1])
        return None


def _rest(node: Node[Ticket]) -> None:
    """Nothing waits here any more. Nobody was kept waiting by what the children had, so all of it is forgotten."""
    node.place, node.cost_ms = None, 0.0
    node.children.clear()
    node.order.clear()
