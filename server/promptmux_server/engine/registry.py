"""Names to served tasks: the prompt directory as the engine sees it, reloadable while requests run.

A request resolves its name once, at admission, and its lease keeps that version loadable until it ends, whatever the
name stands for by then. Owns names and their versions. How a file is checked belongs to `promptmux_prompts`; where a
version's numbers are, to `prompt_tiers`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from promptmux_prompts import Prompt, PromptFileError, Refusal
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.engine.prompt_files import PromptFiles
from promptmux_server.engine.prompt_tiers import Place, PromptTiers
from promptmux_server.engine.prompt_versions import Lease, PromptSource
from promptmux_server.engine.request import PromptRef, ReloadReport, TaskProblem, TaskStatus
from promptmux_server.errors import PinRefused, PromptNotFound, PromptQuarantined, PromptTooLarge
from promptmux_server.tasks import TaskSpec


@dataclass(frozen=True, eq=False)
class ServedTask:
    """One version of one task."""

    ref: PromptRef
    spec: TaskSpec
    source: PromptSource
    metric: dict[str, object] | None


@dataclass
class _Usage:
    """Of a name, across its versions."""

    version: int = 0
    hits: int = 0
    last_used: float | None = None


@dataclass
class _State:
    served: dict[str, ServedTask] = field(default_factory=dict)
    refused: dict[str, TaskProblem] = field(default_factory=dict)
    usage: dict[str, _Usage] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    """Names whose version of the moment is pinned."""


class Registry:
    """The tasks of one prompt directory on one backbone; every method may be called from any thread."""

    def __init__(self, files: PromptFiles, config: BackboneConfig, tiers: PromptTiers) -> None:
        self._files, self._config, self._tiers = files, config, tiers
        self._state = _State()
        self._lock = threading.Lock()
        self._reloading = threading.Lock()

    def reload(self) -> ReloadReport:
        """Read the directory again; a bad file is refused with its reason and harms no other.

        Files are taken up one by one, so that no more than one prompt's numbers are in transit.
        """
        with self._reloading:  # an older view of the directory must not overtake a newer one
            with self._lock:
                before = {name: task.ref.sha256 for name, task in self._state.served.items()}
            refused: dict[str, TaskProblem] = {}
            after: dict[str, str] = {}
            for entry in self._files.scan():
                with self._lock:
                    self._take_up(entry, after, refused)
            with self._lock:
                return self._conclude(before, after, refused)

    def _take_up(self, entry: Prompt | Refusal, after: dict[str, str], refused: dict[str, TaskProblem]) -> None:
        """Serve a good file's version; a name whose file turned bad keeps its good version while there is a copy."""
        if isinstance(entry, Refusal):
            refused[entry.name] = TaskProblem(entry.code, entry.message)
            return
        name = entry.manifest.name
        try:
            self._serve(entry)
        except (PromptFileError, PromptTooLarge) as error:
            refused[name] = TaskProblem(error.code, str(error))
        else:
            after[name] = entry.digest

    def _conclude(self, before: dict[str, str], after: dict[str, str], refused: dict[str, TaskProblem]) -> ReloadReport:
        """Retire what is gone, and say what has changed."""
        removed = sorted(before.keys() - after.keys() - refused.keys())
        for name in removed:
            self._state.pinned.discard(name)
            self._tiers.retire(self._state.served.pop(name).ref.sha256)
        for name in before.keys() & refused.keys():
            self._tiers.lose(before[name])
        self._state.refused = {name: problem for name, problem in refused.items() if name not in before}
        return ReloadReport(
            added=tuple(sorted(after.keys() - before.keys())),
            changed=tuple(sorted(n for n, digest in after.items() if before.get(n, digest) != digest)),
            removed=tuple(removed),
            unchanged=tuple(sorted(n for n, digest in after.items() if before.get(n) == digest)),
            refused=refused,
        )

    def _serve(self, prompt: Prompt) -> None:
        name = prompt.manifest.name
        source = self._files.source(prompt)
        before = self._state.served.get(name)
        if before is not None and before.ref.sha256 == prompt.digest:
            self._tiers.register(source, prompt)
            return
        spec = TaskSpec.from_manifest(prompt.manifest, self._config)
        if self._tiers.too_large(source.encoder_length, source.decoder_length):
            raise PromptTooLarge(
                "the prompt needs more room than the device's prompt pool has beside what is pinned there; "
                "see PROMPTMUX_PROMPT_DEVICE_BYTES"
            )
        usage = self._state.usage.setdefault(name, _Usage())
        usage.version += 1
        self._tiers.register(source, prompt)
        self._state.served[name] = ServedTask(
            ref=PromptRef(name, usage.version, prompt.digest),
            spec=spec,
            source=source,
            metric=dict(prompt.manifest.metric) if prompt.manifest.metric else None,
        )
        self._state.refused.pop(name, None)
        if before is not None:
            self._tiers.retire(before.ref.sha256)
            self._pin_again(name)

    def _pin_again(self, name: str) -> None:
        """A pin is the name's: a new version takes it over, unless it is too large for that."""
        if name in self._state.pinned:
            try:
                self._tiers.pin(self._state.served[name].ref.sha256)
            except PinRefused:
                self._state.pinned.remove(name)

    def resolve(self, name: str) -> tuple[ServedTask, Lease]:
        """The version that a name stands for now, and a lease on it, which the caller must release."""
        with self._lock:
            task = self._find(name)
            usage = self._state.usage[name]
            usage.hits += 1
            usage.last_used = time.monotonic()
            return task, self._tiers.prefetch(task.ref.sha256)

    def pin(self, name: str) -> None:
        """Keep a task's prompt on the device; raises PromptNotFound, PromptQuarantined or PinRefused."""
        with self._lock:
            self._tiers.pin(self._find(name).ref.sha256)
            self._state.pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let a task's prompt go when others need the room; raises PromptNotFound or PromptQuarantined."""
        with self._lock:
            self._tiers.unpin(self._find(name).ref.sha256)
            self._state.pinned.discard(name)

    def _find(self, name: str) -> ServedTask:
        task = self._state.served.get(name)
        if task is None:
            if name in self._state.refused:
                raise PromptQuarantined(
                    f"This task's prompt file was refused ({self._state.refused[name].code}); see GET /v1/tasks.",
                    param="task",
                )
            raise PromptNotFound("No such task. GET /v1/tasks lists those that are served.", param="task")
        return task

    def status(self, name: str) -> TaskStatus | None:
        """One task, served or refused; None for a name that is neither."""
        with self._lock:
            task, problem = self._state.served.get(name), self._state.refused.get(name)
            if task is not None:
                return self._status(task, self._tiers.place(task.ref.sha256), time.monotonic())
        return None if problem is None else TaskStatus(name=name, state="refused", error=problem)

    def statuses(self) -> list[TaskStatus]:
        """Served and refused tasks, by name."""
        now = time.monotonic()
        with self._lock:
            places = self._tiers.places()
            ready = [self._status(task, places[task.ref.sha256], now) for task in self._state.served.values()]
            refused = [
                TaskStatus(name=name, state="refused", error=problem) for name, problem in self._state.refused.items()
            ]
        return sorted(ready + refused, key=lambda status: status.name)

    def _status(self, task: ServedTask, place: Place, now: float) -> TaskStatus:
        usage = self._state.usage[task.ref.name]
        return TaskStatus(
            name=task.ref.name,
            state="ready",
            kind=task.spec.kind,
            version=task.ref.version,
            sha256=task.ref.sha256,
            encoder_length=task.source.encoder_length,
            decoder_length=task.source.decoder_length,
            bytes=task.source.bytes,
            takes_text=task.spec.takes_text,
            takes_premise=task.spec.manifest.takes_premise,
            takes_image=task.spec.takes_image,
            metric=task.metric,
            hits=usage.hits,
            tier=place.tier,
            pinned=place.pinned,
            last_used_s=None if usage.last_used is None else round(now - usage.last_used, 3),
        )
