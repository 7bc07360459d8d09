"""Names to served versions, in memory: what requests see, and where a name begins to stand for another version.

A request resolves its name once, at admission, and its lease keeps that version loadable until it ends, whatever the
name stands for by then. Owns names and who holds a version. What is on disk, and who may change it, is `publisher`'s;
where a version's numbers are, `prompt_tiers`'.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from promptmux_prompts import Prompt, VersionRecord
from promptmux_server.engine.prompt_table import Pages
from promptmux_server.engine.prompt_tiers import PromptTiers
from promptmux_server.engine.prompt_versions import Lease, PromptSource
from promptmux_server.engine.request import PromptRef, RegistryStats, TaskInputs, TaskProblem, TaskStatus
from promptmux_server.engine.task_specs import TaskSpecs
from promptmux_server.errors import PinRefused, PromptNotFound, PromptQuarantined, PromptTooLarge
from promptmux_server.tasks import TaskSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Listed:
    """What a name stands for."""

    record: VersionRecord
    source: PromptSource
    inputs: TaskInputs
    pinned: bool
    """Its prompt is to stay on the device, wherever it is now."""


@dataclass(frozen=True, eq=False)
class ServedTask:
    """One version of one task, as a request holds it."""

    ref: PromptRef
    spec: TaskSpec


@dataclass
class _Usage:
    """Of a name, across its versions."""

    hits: int = 0
    last_used: float | None = None


class Registry:
    """The names of one engine; every method may be called from any thread."""

    def __init__(self, specs: TaskSpecs, tiers: PromptTiers) -> None:
        self._specs, self._tiers = specs, tiers
        self._listed: dict[str, Listed] = {}
        self._refused: dict[str, TaskProblem] = {}
        self._usage: dict[str, _Usage] = {}
        self._holders: Counter[str] = Counter()
        """How many names stand for a digest: two may stand for the same content."""
        self._coming: list[Pages] = []
        """Of versions that are about to be adopted."""
        self._pinned: set[str] = set()
        """Names that are to stay on the device."""
        self._order: list[str] | None = None
        """All names, sorted; None after a change."""
        self._lock = threading.Lock()

    # -- changes ----------------------------------------------------------------------------------------------------

    @contextmanager
    def coming(self, encoder_length: int, decoder_length: int) -> Iterator[None]:
        """While a version of these lengths is on its way, nothing is pinned that would leave it no room.

        Raises PromptTooLarge if there is none already.
        """
        pages = Pages.of(encoder_length, decoder_length)
        with self._lock:
            if self._tiers.too_large(encoder_length, decoder_length):
                raise PromptTooLarge(
                    "The prompt needs more room than the device's prompt pool has beside what is pinned there; "
                    "see PROMPTMUX_PROMPT_DEVICE_BYTES."
                )
            self._coming.append(pages)
        try:
            yield
        finally:
            with self._lock:
                self._coming.remove(pages)

    def adopt(self, listed: Listed) -> bool:
        """Let a name stand for a version from now on; True if that changes anything."""
        with self._lock:
            return self._adopt(listed)

    def follow(self, name: str, before: Listed | None, after: Listed | None) -> None:
        """Adopt or forget what another process has changed, unless the name has been changed here since `before`."""
        with self._lock:
            if self._listed.get(name) is not before:
                return
            if after is not None:
                self._adopt(after)
            elif before is not None:
                self._forget(name)

    def forget(self, name: str) -> None:
        """Let a name stand for nothing."""
        with self._lock:
            self._forget(name)

    def lose(self, name: str) -> None:
        """The file of what a name stands for has turned bad: it is served while there is a copy."""
        with self._lock:
            if name in self._listed:
                self._tiers.lose(self._listed[name].source.digest)

    def refuse(self, problems: Mapping[str, TaskProblem]) -> None:
        """These names, and no others, are known and not served, as far as none stands for a version."""
        with self._lock:
            self._refused = {name: problem for name, problem in problems.items() if name not in self._listed}
            self._order = None

    def _adopt(self, listed: Listed) -> bool:
        name, digest = listed.record.name, listed.source.digest
        before = self._listed.get(name)
        self._listed[name] = listed
        if before is None:
            self._order = None
            self._refused.pop(name, None)
            self._usage[name] = _Usage()
        if before is None or before.source.digest != digest:
            self._tiers.register(listed.source)
            self._holders[digest] += 1
            if before is not None:
                self._release(before.source.digest)
        self._follow_pin(listed)
        return before is None or before.record.version != listed.record.version

    def _forget(self, name: str) -> None:
        before = self._listed.pop(name, None)
        if before is not None:
            self._pinned.discard(name)
            self._order = None
            del self._usage[name]
            self._release(before.source.digest)
        elif self._refused.pop(name, None) is not None:
            self._order = None

    def set_pinned(self, name: str, pinned: bool) -> None:
        """Pin or unpin the version of the moment and those after it; raises as `listed` does, and PinRefused."""
        with self._lock:
            listed = self._find(name)
            if pinned:
                self._tiers.pin(listed.source.digest, self._coming)
                self._pinned.add(name)
            else:
                self._pinned.discard(name)
                self._unpin(listed.source.digest)
            self._listed[name] = replace(listed, pinned=pinned)

    def _release(self, digest: str) -> None:
        """A name stands for this version no more."""
        self._unpin(digest)
        self._holders[digest] -= 1
        if not self._holders[digest]:
            del self._holders[digest]
            self._tiers.retire(digest)

    def _follow_pin(self, listed: Listed) -> None:
        """A pin is the name's: a new version takes it over, unless it is too large for that."""
        if not listed.pinned:
            self._pinned.discard(listed.record.name)
            self._unpin(listed.source.digest)
            return
        try:
            self._tiers.pin(listed.source.digest, self._coming)
            self._pinned.add(listed.record.name)
        except PinRefused:
            self._pinned.discard(listed.record.name)
            log.warning("prompt %s is too large to be pinned beside the others", listed.record.name)

    def _unpin(self, digest: str) -> None:
        """Let a version go that is pinned, unless another pinned name stands for it too."""
        if not self._tiers.place(digest).pinned:
            return
        if all(self._listed[name].source.digest != digest for name in self._pinned):
            self._tiers.unpin(digest)

    # -- requests ---------------------------------------------------------------------------------------------------

    def resolve(self, name: str) -> tuple[ServedTask, Lease]:
        """The version that a name stands for now, and a lease on it, which the caller must release.

        Raises PromptNotFound or PromptQuarantined.
        """
        with self._lock:
            listed = self._find(name)
            usage = self._usage[name]
            usage.hits += 1
            usage.last_used = time.monotonic()
            lease = self._tiers.prefetch(listed.source.digest)
        try:
            spec = self._specs.of(listed.source)  # outside the lock: it may have to be read
        except BaseException:
            self._tiers.release(lease)
            raise
        record = listed.record
        return ServedTask(PromptRef(name, record.version, record.sha256), spec), lease

    def _find(self, name: str) -> Listed:
        found = self._listed.get(name)
        if found is not None:
            return found
        if name in self._refused:
            code = self._refused[name].code
            raise PromptQuarantined(f"This task's prompt was refused ({code}); see GET /v1/tasks.", param="task")
        raise PromptNotFound("No such task. GET /v1/tasks lists those that are served.", param="task")

    # -- what can be seen -------------------------------------------------------------------------------------------

    def listed(self, name: str) -> Listed:
        """What a name stands for; raises PromptNotFound, or PromptQuarantined for one that is known and refused."""
        with self._lock:
            return self._find(name)

    def get(self, name: str) -> Listed | None:
        with self._lock:
            return self._listed.get(name)

    def inputs(self, name: str) -> TaskInputs | None:
        """What a task takes; None for a name that is not served."""
        listed = self._listed.get(name)
        return None if listed is None else listed.inputs

    def offer(self, prompt: Prompt) -> None:
        """Spare the first request for a new version a turn to the disk, if there is room in host memory."""
        self._tiers.offer(prompt)

    def digests(self) -> dict[str, str]:
        """What every served name stands for."""
        with self._lock:
            return {name: listed.source.digest for name, listed in self._listed.items()}

    def stats(self) -> RegistryStats:
        return RegistryStats(names=len(self._listed), quarantined=len(self._refused))

    def names(self, after: str = "", limit: int | None = None) -> list[str]:
        """Served and refused ones behind `after`, sorted, at most `limit`."""
        with self._lock:
            if self._order is None:
                self._order = sorted({*self._listed, *self._refused})
            start = bisect_right(self._order, after)
            return self._order[start:] if limit is None else self._order[start : start + limit]

    def statuses(self, after: str = "", limit: int | None = None) -> list[TaskStatus]:
        """Of those names; may read the versions' files."""
        found = (self.status(name) for name in self.names(after, limit))
        return [status for status in found if status is not None]

    def status(self, name: str) -> TaskStatus | None:
        """One task, served or refused; None for a name that is neither. May read the version's file."""
        with self._lock:
            listed, problem = self._listed.get(name), self._refused.get(name)
            if listed is None:
                return None if problem is None else TaskStatus(name=name, state="refused", error=problem)
            usage, place = replace(self._usage[name]), self._tiers.place(listed.source.digest)
        record, source, inputs = listed.record, listed.source, listed.inputs
        status = TaskStatus(
            name=name,
            state="ready",
            kind=inputs.kind,
            version=record.version,
            sha256=record.sha256,
            author=record.author,
            created=record.created,
            encoder_length=source.encoder_length,
            decoder_length=source.decoder_length,
            bytes=source.bytes,
            takes_text=inputs.takes_text,
            takes_premise=inputs.takes_premise,
            takes_image=inputs.takes_image,
            hits=usage.hits,
            tier=place.tier,
            pinned=place.pinned,
            last_used_s=None if usage.last_used is None else round(time.monotonic() - usage.last_used, 3),
        )
        try:
            manifest = self._specs.of(source).manifest
        except PromptQuarantined:
            return status
        return replace(
            status,
            encoder_layers=manifest.encoder_layers,
            decoder_layers=manifest.decoder_layers,
            metric=manifest.metric,
            provenance=manifest.provenance,
        )
