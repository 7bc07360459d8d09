"""Versions on the device, in host memory and on disk: exact accounts, nobody starved, nobody harmed."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from promptmux_prompts import Prompt
from promptmux_server.engine import prompt_tiers
from promptmux_server.engine.prompt_table import NO_PROMPT
from promptmux_server.engine.prompt_tiers import PATIENCE, Fetch, Load
from promptmux_server.engine.prompt_versions import Lease
from promptmux_server.errors import Internal, PinRefused, PromptQuarantined
from tier_bench import Bench, prompt

NAMES = "abcdefg"
LENGTHS = ((20, 20), (70, 5), (0, 40), (33, 0), (0, 0), (96, 96))
"""1 + 1, 3 + 1, 0 + 2, 2 + 0, no and 3 + 3 pages."""


class Tiers(RuleBasedStateMachine):
    """Anything in any order, checked after every step."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.patience = pytest.MonkeyPatch()
        self.patience.setattr(prompt_tiers, "PATIENCE", 2)
        self.bench = Bench(pages=5, host_prompts=3)
        self.serving: dict[str, Prompt] = {}
        self.open: list[Lease] = []
        self.damaged: set[str] = set()
        """Digests that the disk did not hold at some time while they could be claimed."""

    @rule(name=st.sampled_from(NAMES), revision=st.integers(0, 2), seeded=st.booleans())
    def publish(self, name: str, revision: int, seeded: bool) -> None:
        lengths = LENGTHS[(NAMES.index(name) + revision) % len(LENGTHS)]
        new, old = prompt(name, revision, *lengths), self.serving.get(name)
        if self.bench.tiers.too_large(*lengths):
            return
        self.bench.serve(new, seeded=seeded)
        self.serving[name] = new
        if old is not None and old.digest != new.digest:
            self.damaged.add(old.digest)
            self.bench.tiers.retire(old.digest)

    @rule(name=st.sampled_from(NAMES), noticed=st.booleans())
    def damage(self, name: str, noticed: bool) -> None:
        if name in self.serving:
            self.bench.disk.pop(name, None)
            self.damaged.add(self.serving[name].digest)
            if noticed:
                self.bench.tiers.lose(self.serving[name].digest)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        if name in self.serving:
            self.bench.disk.pop(name, None)
            self.damaged.add(self.serving[name].digest)
            self.bench.tiers.retire(self.serving.pop(name).digest)

    @precondition(lambda self: self.serving)
    @rule(target=leases, choice=st.integers(0, 99))
    def admit(self, choice: int) -> Lease:
        chosen = sorted(self.serving.values(), key=lambda item: item.digest)[choice % len(self.serving)]
        lease = self.bench.tiers.prefetch(chosen.digest)
        self.open.append(lease)
        return lease

    @rule(lease=leases)
    def hold(self, lease: Lease) -> None:
        digest = lease.version.source.digest
        try:
            home = self.bench.tiers.hold(lease)
        except PromptQuarantined:
            assert digest in self.damaged
        else:
            assert home is None or self.bench.reads_as(home, digest)

    @rule(lease=consumes(leases))
    def release(self, lease: Lease) -> None:
        self.bench.tiers.release(lease)
        self.bench.tiers.release(lease)
        self.open.remove(lease)

    @rule(lease=leases)
    def cancel(self, lease: Lease) -> None:
        before = lease.residence
        self.bench.tiers.cancel(lease)
        assert lease.ended != bool(before)
        assert lease.residence is before

    @rule(name=st.sampled_from(NAMES), wanted=st.booleans())
    def pin(self, name: str, wanted: bool) -> None:
        if name not in self.serving:
            return
        digest = self.serving[name].digest
        if not wanted:
            self.bench.tiers.unpin(digest)
            return
        try:
            self.bench.tiers.pin(digest)
        except PinRefused:
            assert not self.bench.tiers.places()[digest].pinned

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.bench.loader.step()

    @rule()
    def settle(self) -> None:
        """When the loader rests and nobody reads, somebody of those who wait is served."""
        self.bench.settle()
        waiting = [lease for lease in self.open if not lease.ended and lease.error is None and lease.residence is None]
        reading = any(lease.residence is not None for lease in self.open)
        if waiting and not reading:
            assert any(self.bench.tiers.hold(lease) is not None for lease in waiting)

    @invariant()
    def accounts_agree(self) -> None:
        self.bench.check([lease for lease in self.open if not lease.ended])

    def teardown(self) -> None:
        self.patience.undo()
        for lease in self.open:
            self.bench.tiers.release(lease)
        for item in self.serving.values():
            self.bench.tiers.retire(item.digest)
        self.bench.settle()
        stats = self.bench.tiers.stats()
        assert (stats.device_bytes, stats.host_bytes, stats.resident, stats.waiting) == (0, 0, 0, 0)
        assert not self.bench.tiers.places()
        self.bench.check([])


class TestTiers(Tiers.TestCase):
    settings = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))


def full_bench() -> tuple[Bench, Lease]:
    """Two prompts on the device, one of them held."""
    bench = Bench(pages=3, host_prompts=2)
    bench.serve(prompt("a"), prompt("b"))
    leases = [bench.tiers.prefetch(prompt(name).digest) for name in "ab"]
    bench.settle()
    assert all(bench.tiers.hold(lease) for lease in leases)
    bench.tiers.release(leases[1])
    return bench, leases[0]


@pytest.mark.parametrize("fault", ["leaked", "shared", "dirty", "foreign", "hold-lost"])
def test_the_accounts_notice(fault: str) -> None:
    """The control of the state machine: each of its checks can fail."""
    bench, lease = full_bench()
    a, b = bench.tiers._versions[prompt("a").digest], bench.tiers._versions[prompt("b").digest]
    assert a.home is not None
    bench.check([lease])
    pool = bench.pools.encoder
    if fault == "leaked":
        pool._free.pop()
    elif fault == "shared":
        b.home = a.home
    elif fault == "dirty":
        pool.value[0, pool._free[-1]] = 1
    elif fault == "foreign":
        pool.key[0, a.home.encoder_pages[0]] += 1
    else:
        a.held = 0
    with pytest.raises(AssertionError):
        bench.check([lease])


def test_the_least_recently_read_goes_first() -> None:
    bench = Bench(pages=2)
    bench.serve(*map(prompt, "abc"))
    for name in "aba":
        lease = bench.tiers.prefetch(prompt(name).digest)
        bench.settle()
        assert bench.tiers.hold(lease)
        bench.tiers.release(lease)
    bench.fetch(prompt("c"))
    assert {d: p.tier for d, p in bench.tiers.places().items()} == {
        prompt("a").digest: "device",
        prompt("b").digest: "disk",
        prompt("c").digest: "device",
    }


def test_a_cancelled_prefetch_evicts_nobody() -> None:
    bench = Bench(pages=1)
    bench.serve(*map(prompt, "ab"))
    lease = bench.tiers.prefetch(prompt("a").digest)
    bench.settle()
    bench.tiers.release(lease)
    bench.tiers.cancel(bench.tiers.prefetch(prompt("b").digest))
    bench.settle()
    assert bench.tiers.places()[prompt("a").digest].tier == "device"
    assert bench.tiers.stats().evictions == 0


def test_a_younger_claim_never_takes_the_place_of_an_older_one() -> None:
    bench = Bench(pages=1)
    bench.serve(*map(prompt, "ab"))
    older = bench.tiers.prefetch(prompt("a").digest)
    younger = bench.tiers.prefetch(prompt("b").digest)
    bench.settle()
    assert bench.tiers.hold(younger) is None
    assert bench.tiers.hold(older)
    bench.tiers.release(older)
    bench.settle()
    assert bench.tiers.hold(younger)


def rounds_until_held(patience: int, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Two tasks whose readers overlap without end fill the device; how long a third task waits for its turn."""
    monkeypatch.setattr(prompt_tiers, "PATIENCE", patience)
    bench = Bench(pages=2)
    bench.serve(*map(prompt, "abc"))
    waiting: list[Lease] = []
    held = [bench.tiers.prefetch(prompt(name).digest) for name in "ab"]
    bench.settle()
    assert all(bench.tiers.hold(lease) for lease in held)
    third = bench.tiers.prefetch(prompt("c").digest)
    for turn in range(4 * PATIENCE):
        bench.settle()
        if bench.tiers.hold(third):
            return turn
        waiting.append(bench.tiers.prefetch(prompt("ab"[turn % 2]).digest))
        new = [lease for lease in waiting if bench.tiers.hold(lease)]
        waiting = [lease for lease in waiting if lease not in new]
        held += new
        if len(held) > 2 or (held and not new):
            bench.tiers.release(held.pop(0))
    return None


def test_readers_without_end_let_a_third_task_in(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = rounds_until_held(PATIENCE, monkeypatch)
    assert turns is not None
    assert PATIENCE <= turns <= PATIENCE + 4
    assert rounds_until_held(10**9, monkeypatch) is None  # the control: without patience's end it would starve


def test_a_replaced_version_is_read_to_its_end_by_those_who_claimed_it() -> None:
    bench = Bench(pages=1, host_prompts=2)
    old, new, other = prompt("a"), prompt("a", 1), prompt("b")
    bench.serve(old, other, seeded=True)
    lease = bench.tiers.prefetch(old.digest)
    bench.serve(new)
    bench.tiers.retire(old.digest)
    for item in (other, new):  # both compete for the only place
        claim = bench.tiers.prefetch(item.digest)
        bench.settle()
        bench.tiers.release(claim)
    bench.settle()
    home = bench.tiers.hold(lease)
    assert home is not None
    assert bench.reads_as(home, old.digest)
    bench.tiers.release(lease)
    bench.settle()
    assert old.digest not in bench.tiers.places()
    assert old.digest not in bench.tiers._host


@pytest.mark.parametrize("file", ["gone", "there", "back"])
def test_the_last_copy_on_the_device_stays_while_somebody_claims_it(file: str) -> None:
    bench = Bench(pages=1, host_prompts=0)
    bench.serve(prompt("a"), prompt("b"))
    first = bench.tiers.prefetch(prompt("a").digest)
    bench.settle()
    bench.tiers.release(first)
    older = bench.tiers.prefetch(prompt("b").digest)
    younger = bench.tiers.prefetch(prompt("a").digest)
    if file != "there":
        bench.tiers.lose(prompt("a").digest)
    if file == "back":
        bench.serve(prompt("a"))
    bench.settle()
    assert (bench.tiers.hold(older) is None) == (file == "gone")
    assert (bench.tiers.hold(younger) is not None) == (file == "gone")


def test_a_host_copy_of_a_lost_version_stays_while_somebody_claims_it() -> None:
    bench = Bench(pages=1, host_prompts=1)
    bench.serve(prompt("a"), prompt("b"))
    assert bench.fetch(prompt("a"))
    bench.tiers.lose(prompt("a").digest)
    bench.tiers.prefetch(prompt("b").digest)
    bench.settle()
    assert prompt("a").digest in bench.tiers._host


def test_a_version_that_ends_while_it_is_loaded_leaves_nothing() -> None:
    bench = Bench(pages=1, host_prompts=1)
    bench.serve(prompt("a"))
    lease = bench.tiers.prefetch(prompt("a").digest)
    job = bench.tiers.plan()
    assert isinstance(job, Load)
    bench.tiers.retire(prompt("a").digest)
    bench.tiers.cancel(lease)
    bench.loader._load(job)
    bench.settle()
    bench.check([])
    assert (bench.tiers.stats().device_bytes, bench.tiers.stats().host_bytes) == (0, 0)


def test_a_retired_version_is_pinned_no_more() -> None:
    bench = Bench(pages=2)
    bench.serve(prompt("a"))
    bench.tiers.pin(prompt("a").digest)
    bench.settle()
    assert bench.tiers.too_large(64, 0)
    bench.tiers.retire(prompt("a").digest)
    assert not bench.tiers.too_large(64, 0)


def test_nobody_is_evicted_whose_pages_do_not_help() -> None:
    bench = Bench(pages=2)
    elsewhere, there, new = prompt("x", 0, 0, 20), prompt("y", 0, 20, 0), prompt("z", 0, 64, 0)
    bench.serve(elsewhere, there, new)
    for item in (elsewhere, there):
        lease = bench.tiers.prefetch(item.digest)
        bench.settle()
        bench.tiers.release(lease)
    assert bench.fetch(new)
    assert [bench.tiers.places()[item.digest].tier for item in (elsewhere, there)] == ["device", "disk"]


def closed_bench(monkeypatch: pytest.MonkeyPatch, changes: list[int]) -> tuple[Bench, Lease, Lease]:
    """One place, read by a; the claim of b has waited long enough, so that a younger claim of a must wait."""
    monkeypatch.setattr(prompt_tiers, "PATIENCE", 0)
    bench = Bench(pages=1, on_change=lambda: changes.append(1))
    bench.serve(prompt("a"), prompt("b"))
    assert bench.fetch(prompt("a"))
    older, younger = (bench.tiers.prefetch(prompt(name).digest) for name in "ba")
    bench.settle()
    assert bench.tiers.hold(younger) is None
    changes.clear()
    return bench, older, younger


def test_a_closed_version_opens_when_the_older_claim_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[int] = []
    bench, older, younger = closed_bench(monkeypatch, changes)
    bench.tiers.cancel(older)
    bench.settle()
    assert changes == [1]
    assert bench.tiers.hold(younger)


def test_a_closed_version_opens_when_it_becomes_the_last_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[int] = []
    bench, _, younger = closed_bench(monkeypatch, changes)
    bench.tiers.lose(prompt("a").digest)
    bench.settle()
    assert changes == [1]
    assert bench.tiers.hold(younger)


def test_a_damaged_file_fails_its_own_requests_and_heals() -> None:
    bench = Bench(pages=2)
    bench.serve(prompt("a"), prompt("b"))
    del bench.disk["a"]
    bad, good = bench.tiers.prefetch(prompt("a").digest), bench.tiers.prefetch(prompt("b").digest)
    bench.settle()
    with pytest.raises(PromptQuarantined, match="roll it back"):
        bench.tiers.hold(bad)
    assert bench.tiers.hold(good)
    bench.tiers.release(bad)
    bench.disk["a"] = prompt("a")
    assert bench.fetch(prompt("a"))


def test_a_failing_copy_gives_its_pages_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(pages=1)
    bench.serve(prompt("a"))
    with monkeypatch.context() as broken:
        broken.setattr(bench.pools, "write", lambda *_: 1 / 0)
        with pytest.raises(Internal):
            bench.fetch(prompt("a"))
    bench.settle()
    assert bench.tiers.stats().device_bytes == 0
    assert bench.fetch(prompt("a"))


def test_no_prompt_waits_for_nothing() -> None:
    bench = Bench(pages=1)
    plain = prompt("plain", 0, 0, 0)
    bench.serve(prompt("a"), plain)
    bench.fetch(prompt("a"))  # held: the device is full
    bench.tiers.prefetch(prompt("a").digest)
    assert bench.tiers.hold(bench.tiers.prefetch(plain.digest)) is NO_PROMPT
    assert bench.tiers.places()[plain.digest].tier == "device"


def test_pins_stay_and_leave_room_for_the_largest() -> None:
    bench = Bench(pages=4)
    large = prompt("large", 0, 64, 64)  # 2 + 2 pages
    bench.serve(*map(prompt, "abc"), large)
    bench.tiers.pin(prompt("a").digest)
    bench.tiers.pin(prompt("b").digest)
    with pytest.raises(PinRefused):
        bench.tiers.pin(prompt("c").digest)
    assert bench.tiers.too_large(65, 1)
    assert not bench.tiers.too_large(64, 64)
    lease = bench.tiers.prefetch(large.digest)
    bench.settle()
    assert bench.tiers.hold(lease)
    places = bench.tiers.places()
    assert [places[prompt(name).digest].tier for name in "abc"] == ["device", "device", "disk"]
    bench.tiers.release(lease)
    assert bench.fetch(prompt("c"))
    assert bench.tiers.hold(bench.tiers.prefetch(prompt("a").digest))
    bench.tiers.unpin(prompt("a").digest)
    bench.tiers.pin(prompt("c").digest)


def test_a_host_copy_spares_the_disk_and_the_oldest_goes() -> None:
    bench = Bench(pages=1, host_prompts=2)
    bench.serve(*map(prompt, "abc"))
    for name in "abcb":
        lease = bench.tiers.prefetch(prompt(name).digest)
        bench.settle()
        bench.tiers.release(lease)
    assert bench.reads == 3
    tiers = {name: bench.tiers.places()[prompt(name).digest].tier for name in "abc"}
    assert tiers == {"a": "disk", "b": "device", "c": "host"}


def test_what_waits_for_a_full_device_is_read_ahead() -> None:
    bench = Bench(pages=1, host_prompts=2)
    bench.serve(*map(prompt, "ab"))
    assert bench.fetch(prompt("a"))
    bench.tiers.prefetch(prompt("b").digest)
    assert isinstance(bench.tiers.plan(), Fetch)
    bench.settle()
    assert bench.tiers.places()[prompt("b").digest].tier == "host"


def test_64_tasks_share_8_places_among_threads() -> None:
    changed = threading.Condition()

    def wake() -> None:
        with changed:
            changed.notify_all()

    bench = Bench(pages=8, host_prompts=20, on_change=wake)
    prompts = [prompt(f"t{i}") for i in range(64)]
    bench.serve(*prompts)
    bench.loader.start()
    faults: list[str] = []

    def hold_many(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(500):
            item = rng.choice(prompts)
            lease = bench.tiers.prefetch(item.digest)
            if rng.random() < 0.1:
                bench.tiers.cancel(lease)
                continue
            with changed:
                if not changed.wait_for(lambda lease=lease: bench.tiers.hold(lease) is not None, timeout=30):  # type: ignore[misc]
                    faults.append("waited too long")
                    return
            home = lease.residence
            if home is None or not bench.reads_as(home, item.digest):
                faults.append(f"{item.manifest.name} read another's numbers")
            bench.tiers.release(lease)

    threads = [threading.Thread(target=hold_many, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    bench.loader.close()
    assert not any(thread.is_alive() for thread in threads)
    assert faults == []
    assert bench.tiers.stats().evictions > 64  # the control: places were short
    bench.settle()
    bench.check([])


def test_pages_of_a_pool_are_a_budget_of_bytes() -> None:
    bench = Bench(pages=5)
    pools = bench.pools
    allocated = sum(pool.key.nbytes + pool.value.nbytes for pool in (pools.encoder, pools.decoder))
    assert allocated == pools.budget_bytes == bench.tiers.stats().device_budget_bytes
    assert torch.count_nonzero(pools.encoder.key) == 0
