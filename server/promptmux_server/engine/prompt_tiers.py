"""More prompts than fit on the device: versions move between its pages, host memory and their files.

A request takes a lease at admission (`prefetch`), is given pages when they are there (`hold`) and gives them back
(`release`); a loader thread moves prompts meanwhile, so that nobody's step waits for another's load. Owns which
version is where, who may read it and who goes next. Does no copying itself: `prompt_loader` carries out what is
planned here. Knows nothing of names, of batches, or of how a file is read.

Who goes next. Claims are numbered in order of admission, and the loader serves the oldest that waits. To make room it
evicts versions that nobody reads: those nobody wants first, least recently read first; of those that are wanted, only
such as are wanted by younger claims. So the oldest claim always gets its turn, whatever order the engine holds in, and
nobody is evicted for one that was cancelled. Where readers follow one another so closely that no version is ever free,
`patience` younger claims may pass the oldest; then as many versions as it needs take no new readers.

What is kept. A version that no name stands for any more, or whose file turned bad, may soon be read no longer: while a
request claims it, its last copy, on the device or in host memory, stays. One whose file is gone before the loader came
to it fails with `PromptQuarantined`. Host copies of what waits for the device stay too. Everything else in host
memory goes least recently used first. Beyond both budgets there is at most one prompt, in transit.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from promptmux_prompts import Prompt
from promptmux_server.engine.prompt_copies import PromptCopies
from promptmux_server.engine.prompt_host import HostCopies, own_copy, prompt_bytes
from promptmux_server.engine.prompt_table import NO_PROMPT, Pages, PromptPools, Residence
from promptmux_server.engine.prompt_versions import Lease, PromptSource, Version
from promptmux_server.engine.request import PromptPoolStats
from promptmux_server.errors import PinRefused, PromptmuxError

PATIENCE = 32
"""Younger claims that may be given pages while the oldest waits, unless the engine says otherwise."""

Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Place:
    """Where a version is now."""

    tier: Tier
    pinned: bool


@dataclass(frozen=True)
class Clean:
    """Pages to be zeroed."""

    home: Residence


@dataclass(frozen=True)
class Load:
    """Pages to be filled with a version, of which there may be a host copy."""

    version: Version
    home: Residence
    kept: Prompt | None


@dataclass(frozen=True)
class Fetch:
    """A version to be read to host memory while the device has no room for it."""

    version: Version


class PromptTiers:
    """Prompt versions by digest. Any thread may call any method; `hold` is for the thread that reads the pools."""

    def __init__(self, pools: PromptPools, copies: PromptCopies, host_bytes: int, patience: int | None = None) -> None:
        """`patience`: younger claims that may be given pages while the oldest waits, such as one batch of them."""
        self._patience = PATIENCE if patience is None else patience
        self._pools, self._copies = pools, copies
        self._host = HostCopies(host_bytes)
        self._versions: dict[str, Version] = {}
        self._resident: OrderedDict[Version, None] = OrderedDict()
        """Those that have pages, least recently read first."""
        self._wanted: set[Version] = set()
        """Those that somebody waits for."""
        self._pins: set[Version] = set()
        self._dirty: list[Residence] = []
        """Pages that are nobody's any more and not zeroed yet."""
        self._head: int | None = None
        """Number of the claim that the loader is serving."""
        self._passed = 0
        """Younger claims that were given pages since it became the oldest."""
        self._closed: set[Version] = set()
        """Those that take no younger readers, so that the oldest claim gets their pages."""
        self._numbers = self._loads = self._evictions = 0
        self._wait_s = 0.0
        self._changed = self._poked = False
        self._lock = threading.Condition()

    # -- versions ---------------------------------------------------------------------------------------------------

    def too_large(self, encoder_length: int, decoder_length: int) -> bool:
        """Whether a prompt of these lengths could never be loaded beside what is pinned."""
        with self._lock:
            return not self._pools.total.covers(self._pinned() + Pages.of(encoder_length, decoder_length))

    def register(self, source: PromptSource, prompt: Prompt | None = None) -> None:
        """Let a version be claimed. Its prompt, if at hand, is kept in host memory if there is room to spare."""
        with self._lock:
            version = self._versions.setdefault(source.digest, Version(source))
            version.source, version.served, version.lost = source, True, False
            if not source.bytes:
                version.home = NO_PROMPT
        if prompt is not None:
            self.offer(prompt)

    def offer(self, prompt: Prompt) -> None:
        """Keep a prompt that is at hand in host memory, if its version is known and there is room to spare."""
        digest, size = prompt.digest, prompt_bytes(prompt)
        with self._lock:
            if not size or digest in self._host or self._host.victims(size, _no_other) is None:
                return
        copy = own_copy(prompt, self._copies.pinned)
        with self._lock:
            if digest in self._versions:
                self._host.put(copy, _no_other)

    def retire(self, digest: str) -> None:
        """No name stands for a version any more; with its last request it leaves the device and the host."""
        with self._lock:
            version = self._versions[digest]
            version.served = False
            self._unpin(version)
            self._lose(version)
            self._forget_if_over(version)

    def lose(self, digest: str) -> None:
        """A version's file has turned bad, and yet it is served while there is a copy."""
        with self._lock:
            self._lose(self._versions[digest])

    def pin(self, digest: str, coming: Iterable[Pages] = ()) -> None:
        """Keep a version on the device; raises PinRefused if the largest prompt would find no room beside the pins.

        `coming`: of versions that are not known yet and will be.
        """
        with self._lock:
            version = self._versions[digest]
            if version in self._pins:
                return
            others = [*(other.pages for other in self._versions.values()), *coming]
            largest = Pages(max(other.encoder for other in others), max(other.decoder for other in others))
            if not self._pools.total.covers(self._pinned() + version.pages + largest):
                raise PinRefused("Pinning this prompt would leave the others no room on the device. Unpin one first.")
            self._pins.add(version)
            if version.home is None:
                self._wait(version, None)

    def unpin(self, digest: str) -> None:
        with self._lock:
            self._unpin(self._versions[digest])

    # -- requests ---------------------------------------------------------------------------------------------------

    def prefetch(self, digest: str) -> Lease:
        """Claim a version and have it loaded; returns at once. Every lease must be released."""
        with self._lock:
            version = self._versions[digest]
            lease = Lease(version, self._numbers, time.monotonic())
            self._wait(version, lease)
            return lease

    def hold(self, lease: Lease) -> Residence | None:
        """The pages that this lease may read until its release; None if they are not there yet, or it was released.

        After None, ask again when the loader calls `on_change`. A caller with many leases must not wait for one of them
        while it could hold another. Raises PromptQuarantined if the version cannot be loaded.
        """
        with self._lock:
            version = lease.version
            if lease.error is not None:
                raise lease.error
            if lease.ended or lease.residence is not None:
                return lease.residence
            younger = self._head is not None and lease.number > self._head
            if version.home is None or (younger and version in self._closed):
                return None
            self._end_wait(version, lease.number)
            version.held += 1
            lease.residence = version.home
            if version in self._resident:
                self._resident.move_to_end(version)
            if younger:
                self._passed += 1
                if self._passed == self._patience:
                    self._poke()
            self._copies.before_use(version.written)
            return lease.residence

    def release(self, lease: Lease) -> None:
        """End a claim, held or not; may be called twice."""
        with self._lock:
            if not lease.ended:
                lease.ended = True
                self._let_go(lease)

    def cancel(self, lease: Lease) -> None:
        """End a claim that is not held; one that is held ends with `release`, when its rows are read no more."""
        with self._lock:
            if not lease.ended and lease.residence is None:
                lease.ended = True
                self._let_go(lease)

    # -- what can be seen -------------------------------------------------------------------------------------------

    def place(self, digest: str) -> Place:
        """Where a version is."""
        with self._lock:
            return self._place(self._versions[digest])

    def places(self) -> Mapping[str, Place]:
        """Where every version is, by digest."""
        with self._lock:
            return {digest: self._place(version) for digest, version in self._versions.items()}

    def stats(self) -> PromptPoolStats:
        with self._lock:
            return PromptPoolStats(
                device_bytes=self._pools.used_bytes,
                device_budget_bytes=self._pools.budget_bytes,
                host_bytes=self._host.bytes,
                host_budget_bytes=self._host.budget_bytes,
                resident=len(self._resident),
                waiting=sum(len(version.waiting) for version in self._wanted if version.home is None),
                loads=self._loads,
                evictions=self._evictions,
                wait_s=self._wait_s,
            )

    # -- the loader -------------------------------------------------------------------------------------------------

    def await_work(self) -> None:
        """Block until something has changed that the loader should look at."""
        with self._lock:
            while not self._poked:
                self._lock.wait()
            self._poked = False

    def wake_loader(self) -> None:
        with self._lock:
            self._poke()

    def plan(self) -> Clean | Load | Fetch | None:
        """Zero pages, load for the oldest claim, or make room for it; if there can be none yet, read ahead."""
        with self._lock:
            return self._plan()

    def cleaned(self, job: Clean) -> None:
        with self._lock:
            self._pools.put_back(job.home)

    def arrive(self, job: Load, written: torch.cuda.Event | None) -> None:
        """A version's pages are filled; if its last request has ended meanwhile and no name stands for it, they go."""
        version = job.version
        with self._lock:
            self._loads += 1
            if not self._is_known(version):
                self._dirty.append(job.home)
                return
            version.home, version.written = job.home, written
            self._resident[version] = None
            now = time.monotonic()
            for number, lease in list(version.waiting.items()):
                if lease is None:
                    self._end_wait(version, number)
                else:
                    self._wait_s += now - lease.since
                    lease.since = now
            self._changed = True

    def discard(self, job: Load) -> None:
        """A load has failed: its pages are to be cleaned."""
        with self._lock:
            self._dirty.append(job.home)

    def fail(self, version: Version, kind: type[PromptmuxError], message: str) -> None:
        """Tell those who wait; whoever claims the version later has it tried again."""
        with self._lock:
            for number, lease in list(version.waiting.items()):
                if lease is not None:
                    lease.error = kind(message, param="task")
                self._end_wait(version, number)
            self._changed = True
            self._forget_if_over(version)

    def keep(self, version: Version, prompt: Prompt) -> None:
        """Offer a copy to host memory, which takes it if it may drop enough others."""
        with self._lock:
            if self._is_known(version):
                self._host.put(prompt, self._may_drop)

    def take_change(self) -> bool:
        """Whether somebody may be held, or has failed, since the last call."""
        with self._lock:
            changed, self._changed = self._changed, False
            return changed

    # -- under the lock: who goes next ------------------------------------------------------------------------------

    def _plan(self) -> Clean | Load | Fetch | None:
        if self._dirty:
            return Clean(self._dirty.pop())
        absent = sorted((version for version in self._wanted if version.home is None), key=lambda v: v.oldest)
        self._follow(absent[0].oldest if absent else None)
        if not absent:
            return None
        head = absent[0]
        if self._pools.free.covers(head.pages):
            home = self._pools.take(head.source.encoder_length, head.source.decoder_length)
            return Load(head, home, self._host.get(head.source.digest))
        if victims := self._fewest(head, self._evictable(head.oldest)):
            for victim in victims:
                self._leave_device(victim)
                self._evictions += 1
            return Clean(self._dirty.pop())
        if self._passed >= self._patience and not self._closed:
            self._closed = set(self._fewest(head, [v for v in self._resident if self._may_close(v)]))
        ahead = next((version for version in absent if version.source.digest not in self._host), None)
        if ahead is None or self._host.victims(ahead.source.bytes, self._may_drop) is None:
            return None
        return Fetch(ahead)

    def _follow(self, number: int | None) -> None:
        """Another claim is the oldest: whom it would pass, and what was closed for the last one, begins anew."""
        if number != self._head:
            self._head, self._passed = number, 0
            self._open()

    def _open(self) -> None:
        if self._closed:
            self._closed = set()
            self._changed = True

    def _evictable(self, number: int) -> list[Version]:
        """Versions that may go for the claim of this number, the smallest loss first."""
        free = [v for v in self._resident if not v.held and v not in self._pins and not self._is_last_copy(v)]
        unwanted = [version for version in free if not version.waiting]
        younger = [version for version in free if version.waiting and version.oldest > number]
        return unwanted + sorted(younger, key=lambda version: -version.oldest)

    def _may_close(self, version: Version) -> bool:
        return version not in self._pins and not self._is_last_copy(version)

    def _fewest(self, head: Version, candidates: Iterable[Version]) -> list[Version]:
        """The first candidates whose pages, with those that are free, are enough; none if all are too few."""
        need, free, chosen = head.pages, self._pools.free, []
        for version in candidates:
            helps = Pages(
                version.pages.encoder if free.encoder < need.encoder else 0,
                version.pages.decoder if free.decoder < need.decoder else 0,
            )
            if helps.encoder or helps.decoder:
                chosen.append(version)
                free += version.pages
            if free.covers(need):
                return chosen
        return []

    # -- under the lock: who is where -------------------------------------------------------------------------------

    def _wait(self, version: Version, lease: Lease | None) -> None:
        version.waiting[self._numbers] = lease
        self._numbers += 1
        self._wanted.add(version)
        if version.home is None:
            self._poke()

    def _end_wait(self, version: Version, number: int) -> None:
        version.waiting.pop(number, None)
        if not version.waiting:
            self._wanted.discard(version)

    def _let_go(self, lease: Lease) -> None:
        version = lease.version
        if lease.residence is not None:
            version.held -= 1
            lease.residence = None
        else:
            self._end_wait(version, lease.number)
        self._forget_if_over(version)
        if self._head is not None:
            self._poke()

    def _unpin(self, version: Version) -> None:
        self._pins.discard(version)
        for number, lease in list(version.waiting.items()):
            if lease is None:
                self._end_wait(version, number)
        self._poke()

    def _lose(self, version: Version) -> None:
        version.lost = True
        if version in self._closed:  # it may have to stay, and then its own claims must be let in
            self._open()
            self._poke()

    def _forget_if_over(self, version: Version) -> None:
        if version.served or version.in_use or not self._is_known(version):
            return
        del self._versions[version.source.digest]
        self._host.drop(version.source.digest)
        if version in self._resident:
            self._leave_device(version)
            self._poke()

    def _leave_device(self, version: Version) -> None:
        assert version.home is not None
        self._dirty.append(version.home)
        version.home = version.written = None
        del self._resident[version]

    def _is_known(self, version: Version) -> bool:
        return self._versions.get(version.source.digest) is version

    def _is_last_copy(self, version: Version) -> bool:
        """Whether a request would be lost with the version's pages."""
        return version.lost and version.in_use and version.source.digest not in self._host

    def _may_drop(self, digest: str) -> bool:
        """Whether a host copy may go: nobody claims it, or it is on the device and could be read again."""
        version = self._versions[digest]
        return not version.in_use or (version.home is not None and not version.lost)

    def _pinned(self) -> Pages:
        pages = [version.pages for version in self._pins]
        return Pages(sum(p.encoder for p in pages), sum(p.decoder for p in pages))

    def _place(self, version: Version) -> Place:
        return Place(self._tier(version), version in self._pins)

    def _tier(self, version: Version) -> Tier:
        if version.home is not None:
            return "device"
        return "host" if version.source.digest in self._host else "disk"

    def _poke(self) -> None:
        self._poked = True
        self._lock.notify_all()


def _no_other(_: str) -> bool:
    """No host copy may go for this one."""
    return False
