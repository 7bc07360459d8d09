"""Names to served versions, in memory: what requests see, and the one place where a name begins to mean another version.

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
from dataclasses import dataclass, replace

from promptmux_prompts import Prompt, VersionRecord
from promptmux_server.engine.prompt_tiers import PromptTiers
from promptmux_server.engine.prompt_versions import Lease, PromptSource
from promptmux_server.engine.request import PromptRef, TaskInputs, TaskProblem, TaskStatus
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
        """Names and reservations by digest: two names may stand for the same content."""
        self._order: list[str] | None = None
        """All names, sorted; None after a change."""
        self._lock = threading.Lock()

    # -- changes ----------------------------------------------------------------------------------------------------

    def reserve(self, source: PromptSource, prompt: Prompt | None = None) -> None:
        """Hold a version that no name stands for yet; raises PromptTooLarge. To be followed by `unreserve`, once."""
        with self._lock:
            if self._tiers.too_large(source.encoder_length, source.decoder_length):
                raise PromptTooLarge(
                    "The prompt needs more room than the device's prompt pool has beside what is pinned there; "
                    "see PROMPTMUX_PROMPT_DEVICE_BYTES."
                )
            self._holders[source.digest] += 1
        self._tiers.register(source, prompt)

    def unreserve(self, digest: str) -> None:
        with self._lock:
            self._release(digest)

    def adopt(self, listed: Listed, instead_of: Listed | None = None, *, whatever: bool = False) -> bool:
        """Let a name stand for a version from now on; True if that changes anything.

        Nothing happens if the name stands for something else than `instead_of` by now, unless told `whatever`.
        """
        name = listed.record.name
        with self._lock:
            before = self._listed.get(name)
            if before is not instead_of and not whatever:
                return False
            self._refused.pop(name, None)
            if before is None:
                self._order = None
            same = before is not None and _is_same(before.record, listed.record)
            self._listed[name] = listed
            self._usage.setdefault(name, _Usage())
            if before is None or before.source.digest != listed.source.digest:
                self._holders[listed.source.digest] += 1
                self._tiers.register(listed.source)
                if before is not None:
                    self._release(before.source.digest)
            self._follow_pin(listed)
            return not same

    def forget(self, name: str, problem: TaskProblem | None = None) -> None:
        """A name stands for nothing any more; with a problem, it is known and refused because of that."""
        with self._lock:
            self._order = None
            before = self._listed.pop(name, None)
            if before is not None:
                self._release(before.source.digest)
            self._refused.pop(name, None)
            if problem is not None:
                self._refused[name] = problem
            else:
                self._usage.pop(name, None)

    def set_pinned(self, name: str, pinned: bool) -> None:
        """Pin or unpin the version of the moment and those after it; raises what `listed` does, and PinRefused."""
        with self._lock:
            listed = self._find(name)
            if pinned:
                self._tiers.pin(listed.source.digest)
            self._listed[name] = replace(listed, pinned=pinned)
            if not pinned:
                self._unpin(listed.source.digest)

    def _release(self, digest: str) -> None:
        self._holders[digest] -= 1
        if not self._holders[digest]:
            del self._holders[digest]
            self._tiers.retire(digest)

    def _follow_pin(self, listed: Listed) -> None:
        """A pin is the name's: a new version takes it over, unless it is too large for that."""
        if not listed.pinned:
            self._unpin(listed.source.digest)
            return
        try:
            self._tiers.pin(listed.source.digest)
        except PinRefused:
            log.warning("prompt %s is too large to be pinned beside the others", listed.record.name)

    def _unpin(self, digest: str) -> None:
        if not any(other.pinned for other in self._listed.values() if other.source.digest == digest):
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

    def digests(self) -> dict[str, str]:
        """What every served name stands for."""
        with self._lock:
            return {name: listed.source.digest for name, listed in self._listed.items()}

    def refused(self) -> dict[str, TaskProblem]:
        with self._lock:
            return dict(self._refused)

    def names(self, after: str, limit: int) -> list[str]:
        """Served and refused ones behind `after`, sorted, at most `limit`."""
        with self._lock:
            if self._order is None:
                self._order = sorted({*self._listed, *self._refused})
            start = bisect_right(self._order, after)
            return self._order[start : start + limit]

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
        return replace(status, metric=manifest.metric, provenance=manifest.provenance)


def _is_same(one: VersionRecord, other: VersionRecord) -> bool:
    return (one.version, one.sha256) == (other.version, other.sha256)
