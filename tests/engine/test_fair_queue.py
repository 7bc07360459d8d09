"""The fair queue: nothing lost, nothing handed out twice, no bound passed, and everyone their share."""

from __future__ import annotations

import math
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from promptmux_server.engine.scheduler import BATCH_FRACTION, FairQueue, QueueLimits, Share
from promptmux_server.errors import Draining, Overloaded, PromptmuxError, TenantQueueFull

WIDE = QueueLimits(100_000, 100_000, 100_000)
SHARES = [Share(key, task) for key in ("", "a", "b") for task in ("x", "y")]
SHARES += [Share("a", "x", "batch"), Share("b", "y", "batch")]


def queue(limits: QueueLimits = WIDE, weights: dict[str, float] | None = None) -> FairQueue[int]:
    return FairQueue(limits, weights or {}, random.Random(7))


def anything(_: int) -> bool:
    return True


def take(waiting: FairQueue[int], most: int = 1) -> list[int]:
    return waiting.take(most, math.inf, anything)


class AnyCalls(RuleBasedStateMachine):
    """Random calls beside a model that is a plain dictionary."""

    @initialize(total=st.integers(1, 12), per_key=st.integers(1, 12), per_task=st.integers(1, 12))
    def begin(self, total: int, per_key: int, per_task: int) -> None:
        self.limits = QueueLimits(total, per_key, per_task)
        self.queue = queue(self.limits, {"a": 2.0})
        self.waiting: dict[int, tuple[Share, float]] = {}
        self.gone: set[int] = set()
        self.serial, self.now, self.closed = 0, 0.0, False
        self.virtual: dict[object, float] = {}

    def leave(self, tickets: Iterable[int]) -> None:
        for ticket in tickets:
            assert ticket not in self.gone
            del self.waiting[ticket]
            self.gone.add(ticket)

    def expected_refusal(self, share: Share) -> type[PromptmuxError] | None:
        held = [other for other, _ in self.waiting.values()]
        mine = [other for other in held if (other.key, other.priority) == (share.key, share.priority)]
        batch = sum(other.priority == "batch" for other in held)
        total = self.limits.total
        full = (
            held.count(share) >= self.limits.per_task < total
            or (share.key != "" and len(mine) >= self.limits.per_key < total)
            or (share.priority == "batch" and batch >= self.limits.batch < total)
        )
        if self.closed:
            return Draining
        return TenantQueueFull if full else Overloaded if len(held) >= total else None

    @rule(share=st.sampled_from(SHARES), cost_ms=st.floats(0.1, 50), within_s=st.floats(0, 5) | st.just(math.inf))
    def put(self, share: Share, cost_ms: float, within_s: float) -> None:
        expected = self.expected_refusal(share)
        self.serial += 1
        if expected is None:
            self.queue.put(self.serial, share, cost_ms, self.now + within_s)
            self.waiting[self.serial] = (share, self.now + within_s)
            return
        with pytest.raises(expected) as caught:
            self.queue.put(self.serial, share, cost_ms, self.now + within_s)
        assert caught.value.retry_after_s in range(1, 31)

    @rule(
        most=st.integers(0, 6), budget_ms=st.floats(0.1, 100), unfit=st.sets(st.sampled_from(SHARES)), odd=st.booleans()
    )
    def take(self, most: int, budget_ms: float, unfit: set[Share], odd: bool) -> None:
        asked: Counter[int] = Counter()

        def fits(ticket: int) -> bool:
            asked[ticket] += 1
            return self.waiting[ticket][0] not in unfit and (odd or ticket % 2 == 0)

        taken = self.queue.take(most, budget_ms, fits)
        assert len(taken) == len(set(taken)) <= most
        assert max(asked.values(), default=1) == 1
        assert all(self.waiting[ticket][0] not in unfit and (odd or ticket % 2 == 0) for ticket in taken)
        fitting = any(share not in unfit and (odd or ticket % 2 == 0) for ticket, (share, _) in self.waiting.items())
        assert bool(taken) == (fitting and most > 0)
        for share in {self.waiting[ticket][0] for ticket in taken}:
            own = [ticket for ticket in taken if self.waiting[ticket][0] == share]
            assert own == sorted(own)
        self.leave(taken)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        ticket = data.draw(st.integers(1, self.serial + 1))
        assert self.queue.discard(ticket) == (ticket in self.waiting)
        self.leave({ticket} & set(self.waiting))

    @rule(after_s=st.floats(0, 3))
    def expire(self, after_s: float) -> None:
        self.now += after_s
        late = {ticket for ticket, (_, deadline) in self.waiting.items() if deadline < self.now}
        expired = self.queue.expire(self.now)
        assert sorted(expired) == sorted(late)
        self.leave(expired)

    @rule(share=st.sampled_from(SHARES), extra_ms=st.floats(-60, 60))
    def charge(self, share: Share, extra_ms: float) -> None:
        self.queue.charge(share, extra_ms)

    @rule()
    def clear(self) -> None:
        rest = self.queue.clear()
        assert rest == list(self.waiting)
        self.leave(rest)

    @rule(really=st.integers(0, 9))
    def close(self, really: int) -> None:
        if really == 0:
            self.queue.close()
            self.closed = True

    @invariant()
    def nobody_is_overslept(self) -> None:
        waits = [deadline - self.now for _, deadline in self.waiting.values()]
        assert 0.0 <= self.queue.until_next_deadline(self.now) <= max(0.0, min(waits, default=math.inf))

    @invariant()
    def counts_are_exact(self) -> None:
        shares = Counter(share for share, _ in self.waiting.values())
        assert self.queue.depths() == shares
        assert len(self.queue) == len(self.waiting) <= self.limits.total
        assert self.queue.drained == (self.closed and not self.waiting)

    @invariant()
    def the_tree_agrees_with_itself_and_time_goes_forward(self) -> None:
        nodes = [self.queue._order.root]
        for node in nodes:
            assert node.count == len(node.tickets) + sum(child.count for child in node.children.values())
            assert (node.place is not None) == (node.count > 0 and node.parent is not None)
            assert node.now_ms >= self.virtual.get(node, 0.0)
            self.virtual[node] = node.now_ms
            nodes.extend(node.children.values())

    def teardown(self) -> None:
        assert sorted(self.queue.take(10_000, math.inf, anything)) == sorted(self.waiting)


TestAnyCalls = AnyCalls.TestCase
TestAnyCalls.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# -- shares -----------------------------------------------------------------------------------------------------------


class FirstInFirstOut:
    """The control: a queue that knows no shares."""

    def __init__(self) -> None:
        self.waiting = deque[int]()

    def put(self, ticket: int, share: Share, cost_ms: float) -> None:
        self.waiting.append(ticket)

    def take(self, most: int, budget_ms: float, fits: Callable[[int], bool]) -> list[int]:
        return [self.waiting.popleft() for _ in range(most)]


class Backlog:
    """Shares that always have tickets waiting, of random cost, and what each has been served."""

    def __init__(
        self, shares: list[Share], queue: FairQueue[int] | FirstInFirstOut, largest_ms: float = 1.0, first: int = 0
    ) -> None:
        """The first share begins with `first` tickets more than the others."""
        self.random, self.largest_ms, self.queue = random.Random(3), largest_ms, queue
        self.held: dict[int, tuple[Share, float]] = {}
        self.served = dict.fromkeys(shares, 0.0)
        self.serial = 0
        for share in [shares[0]] * first + shares * 40:
            self.put(share)

    def put(self, share: Share) -> None:
        self.serial += 1
        cost_ms = self.random.uniform(0.1, 1.0) * self.largest_ms
        self.held[self.serial] = (share, cost_ms)
        self.queue.put(self.serial, share, cost_ms)

    def serve(self, most: int) -> float:
        """One batch; returns its milliseconds."""
        batch_ms = 0.0
        for ticket in self.queue.take(most, math.inf, anything):
            share, cost_ms = self.held.pop(ticket)
            self.served[share] += cost_ms
            batch_ms += cost_ms
            self.put(share)
        return batch_ms

    def part(self, share: Share) -> float:
        return self.served[share] / sum(self.served.values())

    def excess_ms(self, batches: int, most: int) -> float:
        """How much further apart than 2 * (the largest request + one batch) two shares are at the worst moment."""
        largest_batch_ms, worst_ms = 0.0, -math.inf
        for _ in range(batches):
            largest_batch_ms = max(largest_batch_ms, self.serve(most))
            gap_ms = max(self.served.values()) - min(self.served.values())
            worst_ms = max(worst_ms, gap_ms - 2 * (self.largest_ms + largest_batch_ms))
        return worst_ms


@given(st.integers(2, 9), st.integers(1, 3), st.integers(1, 32), st.floats(0.5, 200))
@settings(max_examples=25, deadline=None)
def test_two_shares_that_always_wait_are_never_further_apart_than_two_requests_and_batches(
    keys: int, tasks: int, most: int, largest_ms: float
) -> None:
    shares = [Share(f"k{key}", f"t{task}") for key in range(keys) for task in range(tasks)]
    assert Backlog(shares, queue(), largest_ms, first=400).excess_ms(60, most) <= 0


def test_the_bound_is_broken_by_first_in_first_out() -> None:
    shares = [Share("a", "x"), Share("b", "x")]
    assert Backlog(shares, queue(), first=400).excess_ms(60, 8) <= 0
    assert Backlog(shares, FirstInFirstOut(), first=400).excess_ms(60, 8) > 0


def test_weights_divide_the_device_between_keys() -> None:
    shares = [Share("heavy", "x"), Share("light", "x"), Share("unnamed", "x")]
    backlog = Backlog(shares, queue(weights={"heavy": 2.0, "light": 0.5}))
    for _ in range(300):
        backlog.serve(7)
    assert [backlog.part(share) for share in shares] == pytest.approx([4 / 7, 1 / 7, 2 / 7], abs=0.01)


def test_tasks_of_a_key_share_what_the_key_gets() -> None:
    shares = [Share("a", "x"), Share("a", "y"), Share("a", "z"), Share("b", "x")]
    backlog = Backlog(shares, queue())
    for _ in range(300):
        backlog.serve(7)
    assert [backlog.part(share) for share in shares] == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2], abs=0.01)


def test_batch_work_gets_its_fraction_beside_interactive_work_and_no_more() -> None:
    shares = [Share("a", "x"), Share("a", "x", "batch")]
    backlog = Backlog(shares, queue())
    for _ in range(300):
        backlog.serve(8)
    assert backlog.part(shares[1]) == pytest.approx(BATCH_FRACTION, abs=0.01)


def test_interactive_goes_first_and_batch_takes_what_is_left() -> None:
    waiting = queue()
    for ticket in range(4):
        waiting.put(ticket, Share("a", "x", "batch"), 1.0)
    waiting.put(10, Share("a", "x"), 1.0)
    assert take(waiting, 2) == [10, 0]
    assert take(waiting, 9) == [1, 2, 3]


def test_a_share_that_was_idle_has_saved_nothing() -> None:
    waiting = queue()
    for ticket in range(400):
        waiting.put(ticket, Share("busy", "x"), 1.0)
    waiting.put(1000, Share("idle", "x"), 1.0)
    take(waiting, 200)
    for ticket in range(1001, 1200):
        waiting.put(ticket, Share("idle", "x"), 1.0)
    next_ones = take(waiting, 40)
    assert 19 <= sum(ticket >= 1000 for ticket in next_ones) <= 21


def test_what_a_share_has_had_is_remembered_while_others_wait() -> None:
    """A hog that lets its queue run empty for a moment does not come back as a newcomer."""
    waiting = queue()
    for ticket in range(100):
        waiting.put(ticket, Share("patient", "x"), 1.0)
    waiting.put(500, Share("hog", "x"), 30.0)
    assert 500 in take(waiting, 2)
    waiting.put(501, Share("hog", "x"), 1.0)
    assert 501 not in take(waiting, 28)
    assert 501 in take(waiting, 4)


@pytest.mark.parametrize(("extra_ms", "parts"), [(1.0, (1 / 3, 2 / 3)), (-0.5, (2 / 3, 1 / 3)), (0.0, (0.5, 0.5))])
def test_a_corrected_cost_counts_as_if_it_had_been_known(extra_ms: float, parts: tuple[float, float]) -> None:
    waiting, shares, counts = queue(), (Share("wrong", "x"), Share("right", "x")), Counter[Share]()
    for ticket in range(1200):
        waiting.put(ticket, shares[ticket % 2], 1.0)
    for _ in range(600):
        (ticket,) = take(waiting)
        counts[shares[ticket % 2]] += 1
        if ticket % 2 == 0:
            waiting.charge(shares[0], extra_ms)
    assert [counts[share] / 600 for share in shares] == pytest.approx(parts, abs=0.01)


# -- what fits --------------------------------------------------------------------------------------------------------


def test_a_ticket_that_does_not_fit_is_passed_over_and_keeps_its_place() -> None:
    waiting = queue()
    for ticket, task in enumerate("xyxyyy"):
        waiting.put(ticket, Share("a", task), 1.0)
    assert waiting.take(3, math.inf, lambda ticket: ticket not in (0, 2)) == [1, 3, 4]
    assert take(waiting, 9) == [0, 2, 5]


def test_within_a_share_too_the_order_stays_that_of_arrival() -> None:
    waiting = queue()
    for ticket in range(6):
        waiting.put(ticket, Share("a", "x"), 1.0)
    assert waiting.take(2, math.inf, lambda ticket: ticket in (2, 4)) == [2, 4]
    assert take(waiting, 9) == [0, 1, 3, 5]


def test_the_budget_ends_the_picking_but_never_before_the_first() -> None:
    waiting = queue()
    for ticket in range(6):
        waiting.put(ticket, Share("a", "x"), 10.0)
    assert waiting.take(9, 1.0, anything) == [0]
    assert waiting.take(9, 25.0, anything) == [1, 2, 3]
    assert waiting.take(1, 0.0, anything) == [4]
    assert waiting.take(9, 20.0, anything) == [5]


def test_a_deadline_is_kept_to_the_end_and_not_beyond() -> None:
    waiting = queue()
    waiting.put(1, Share("a", "x"), 1.0, deadline=5.0)
    assert waiting.expire(5.0) == []
    assert waiting.expire(5.001) == [1]
    assert take(waiting) == []


def test_nothing_is_kept_of_tickets_that_came_and_went() -> None:
    """Thousands of callers leave at once while one ticket waits: neither order nor deadlines remember them."""
    waiting = queue()
    for task in range(30):
        waiting.put(-1 - task, Share("a", f"t{task}"), 1.0, deadline=1e9)
    for ticket in range(5000):
        waiting.put(ticket, Share("b", f"t{ticket % 30}"), 1.0, deadline=1e9)
        assert waiting.discard(ticket)
    assert len(waiting._deadlines) <= 2 * 31 + 64
    assert len(waiting._order.root.children["interactive"].order) <= 2 * 2 + 16
    for _ in range(500):
        waiting.charge(Share("a", "t7"), 1.0)
    tasks = waiting._order.root.children["interactive"].children["a"]
    assert len(tasks.order) <= 2 * 30 + 16
    assert take(waiting, 99) == [-1 - task for task in range(30) if task != 7] + [-8]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_full_share_is_told_apart_from_a_full_queue() -> None:
    waiting = queue(QueueLimits(total=8, per_key=4, per_task=3))
    for ticket in range(3):
        waiting.put(ticket, Share("a", "x"), 1.0)
    with pytest.raises(TenantQueueFull, match="this task"):
        waiting.put(90, Share("a", "x"), 1.0)
    waiting.put(3, Share("a", "y"), 1.0)
    with pytest.raises(TenantQueueFull, match="your key"):
        waiting.put(91, Share("a", "y"), 1.0)
    for ticket in range(4, 8):
        waiting.put(ticket, Share("b", f"t{ticket}"), 1.0)
    with pytest.raises(Overloaded):
        waiting.put(92, Share("c", "x"), 1.0)
    with pytest.raises(TenantQueueFull):
        waiting.put(93, Share("a", "z"), 1.0)


def test_callers_without_a_key_may_fill_the_queue_and_one_of_its_tasks_may_not() -> None:
    waiting = queue(QueueLimits(total=8, per_key=2, per_task=4))
    for ticket in range(8):
        waiting.put(ticket, Share("", "xy"[ticket % 2]), 1.0)
    with pytest.raises(TenantQueueFull, match="this task"):
        waiting.put(8, Share("", "x"), 1.0)
    with pytest.raises(Overloaded):
        waiting.put(8, Share("", "z"), 1.0)


def test_batch_work_leaves_half_the_queue() -> None:
    waiting = queue(QueueLimits(total=8, per_key=8, per_task=8))
    for ticket in range(4):
        waiting.put(ticket, Share("", f"t{ticket}", "batch"), 1.0)
    with pytest.raises(TenantQueueFull, match="batch work"):
        waiting.put(4, Share("", "t", "batch"), 1.0)
    waiting.put(4, Share("", "t"), 1.0)


def refusal(waiting: FairQueue[int], share: Share) -> int:
    with pytest.raises(PromptmuxError) as caught:
        waiting.put(-1, share, 1.0)
    assert caught.value.retry_after_s is not None
    return caught.value.retry_after_s


def test_retry_after_is_what_the_caller_has_queued_and_spread() -> None:
    for cost_ms, earliest, latest in [(1.0, 1, 4), (1000.0, 8, 12), (60_000.0, 20, 30)]:
        waiting = queue(QueueLimits(total=1000, per_key=8, per_task=1000))
        for ticket in range(8):
            waiting.put(ticket, Share("a", "x"), cost_ms)
        waits = {refusal(waiting, Share("a", "x")) for _ in range(200)}
        assert waits == set(range(earliest, latest + 1))


def test_retry_after_counts_those_one_shares_the_device_with() -> None:
    waiting = queue(QueueLimits(total=1000, per_key=5, per_task=1000))
    for ticket in range(5):
        waiting.put(ticket, Share("a", "x"), 1000.0)
    for ticket in range(5, 9):
        waiting.put(ticket, Share("b", "x"), 1000.0)
    assert min(refusal(waiting, Share("a", "x")) for _ in range(100)) == 9  # both together; b is done before a


# -- threads ----------------------------------------------------------------------------------------------------------


def test_wait_ends_at_news_only() -> None:
    waiting = queue()
    assert not waiting.wait(0.0)
    waiting.put(1, Share("a", "x"), 1.0)
    assert waiting.wait(0.0)
    assert waiting.take(1, math.inf, lambda _: False) == []
    assert not waiting.wait(0.0)
    waiting.wake()
    assert waiting.wait(0.0)
    waiting.put(2, Share("a", "x"), 1.0)
    assert take(waiting, 1) == [1]
    assert waiting.wait(0.0), "one is left that no take has looked at"
    assert take(waiting, 2) == [2]
    assert not waiting.wait(0.0)
    waiting.close()
    assert take(waiting, 2) == []
    assert waiting.wait(0.0), "closed and empty is the end"


def test_waking_needs_no_lock_that_a_take_holds() -> None:
    waiting, loading = queue(), threading.Lock()
    waiting.put(1, Share("a", "x"), 1.0)
    inside, woken = threading.Event(), threading.Event()

    def loader() -> None:
        with loading:
            inside.wait(10)
            waiting.wake()
        woken.set()

    thread = threading.Thread(target=loader, daemon=True)
    thread.start()

    def fits(_: int) -> bool:
        inside.set()
        return woken.wait(10)

    assert waiting.take(1, math.inf, fits) == [1]
    thread.join(10)


def test_many_threads_lose_nothing_and_get_nothing_twice() -> None:
    waiting, got, dropped = queue(), list[int](), list[int]()

    def produce(start: int) -> None:
        for ticket in range(start, start + 500):
            waiting.put(ticket, SHARES[ticket % len(SHARES)], 1.0)
            if ticket % 5 == 0 and waiting.discard(ticket):
                dropped.append(ticket)

    def consume() -> None:
        while not waiting.drained:
            waiting.wait(1.0)
            got.extend(take(waiting, 16))

    producers = [threading.Thread(target=produce, args=(start,)) for start in range(0, 2000, 500)]
    consumers = [threading.Thread(target=consume) for _ in range(2)]
    for thread in producers + consumers:
        thread.start()
    for thread in producers:
        thread.join(30)
    waiting.close()
    for thread in consumers:
        thread.join(30)
    assert sorted(got + dropped) == list(range(2000))


def test_what_would_be_late_before_its_turn_is_refused_at_once() -> None:
    """The caller's own backlog answers 429; of callers without a name, who all are one, everybody's answers 503."""
    queue: FairQueue[int] = FairQueue(QueueLimits(100, 100, 100), {}, random.Random(0))
    for ticket in range(10):
        queue.put(ticket, Share("hog", "t"), cost_ms=500.0)
    with pytest.raises(TenantQueueFull) as refused:
        queue.put(10, Share("hog", "t"), cost_ms=500.0, patience_ms=4000.0)
    assert refused.value.retry_after_s in range(5, 9)
    queue.put(11, Share("hog", "t"), cost_ms=500.0, patience_ms=6000.0)
    queue.put(12, Share("other", "t"), cost_ms=500.0, patience_ms=600.0)
    nameless: FairQueue[int] = FairQueue(QueueLimits(100, 100, 100), {}, random.Random(0))
    nameless.put(0, Share("", "t"), cost_ms=5000.0)
    with pytest.raises(Overloaded):
        nameless.put(1, Share("", "t"), cost_ms=1.0, patience_ms=1000.0)
