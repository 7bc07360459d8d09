"""Names to served tasks: the prompt directory as the engine sees it, reloadable while requests run.

A request resolves its name once, at admission, and holds that version until it ends; a replaced version leaves the
device only when its last holder is gone. Owns versions and reference counts; file checks belong to `promptmux_prompts`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from promptmux_prompts import DirectoryReport, Prompt, PromptFileError, PromptShape, scan_directory
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.engine.prompt_table import PromptPools, Residence
from promptmux_server.engine.request import PromptRef, ReloadReport, TaskProblem, TaskStatus
from promptmux_server.errors import PromptNotFound, PromptQuarantined
from promptmux_server.tasks import TaskSpec


@dataclass(eq=False)
class ServedTask:
    """One version of one task, resident on the device."""

    ref: PromptRef
    spec: TaskSpec
    residence: Residence
    bytes: int
    metric: dict[str, object] | None
    users: int = 0
    """Requests that were resolved to this version and have not ended."""
    retired: bool = False
    """A newer version took the name, or it was removed."""


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


class Registry:
    """The tasks of one prompt directory on one backbone; every method may be called from any thread."""

    def __init__(self, directory: Path, config: BackboneConfig, fingerprint: str, pools: PromptPools) -> None:
        self._directory, self._config, self._fingerprint, self._pools = directory, config, fingerprint, pools
        self._state = _State()
        self._lock = threading.Lock()

    def reload(self) -> ReloadReport:
        """Read the directory again; a bad file is refused with its reason and harms no other."""
        config = self._config
        shape = PromptShape(config.encoder_layers, config.decoder_layers, config.heads, config.head_dim)
        found = scan_directory(
            self._directory, shape=shape, fingerprint=self._fingerprint, dtype=self._pools.encoder.key.dtype
        )
        with self._lock:
            return self._adopt(found)

    def _adopt(self, found: DirectoryReport) -> ReloadReport:
        """Serve what is new, retire what is gone; a name whose file turned bad keeps its good version."""
        before = {name: task.ref.sha256 for name, task in self._state.served.items()}
        refused = {entry.name: TaskProblem(entry.code, entry.message) for entry in found.refused}
        after: dict[str, str] = {}
        for prompt in found.prompts:
            name = prompt.manifest.name
            try:
                if before.get(name) != prompt.digest:
                    self._serve(prompt)
                after[name] = prompt.digest
            except PromptFileError as error:
                refused[name] = TaskProblem(error.code, str(error))
        removed = sorted(before.keys() - after.keys() - refused.keys())
        for name in removed:
            self._retire(self._state.served.pop(name))
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
        spec = TaskSpec.from_manifest(prompt.manifest, self._config)
        usage = self._state.usage.setdefault(name, _Usage())
        usage.version += 1
        tensors = (prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value)
        task = ServedTask(
            ref=PromptRef(name, usage.version, prompt.digest),
            spec=spec,
            residence=self._pools.store(prompt),
            bytes=sum(tensor.nbytes for tensor in tensors),
            metric=dict(prompt.manifest.metric) if prompt.manifest.metric else None,
        )
        if name in self._state.served:
            self._retire(self._state.served[name])
        self._state.served[name] = task

    def _retire(self, task: ServedTask) -> None:
        task.retired = True
        self._free_if_unused(task)

    def _free_if_unused(self, task: ServedTask) -> None:
        if task.retired and task.users == 0:
            self._pools.free(task.residence)

    def resolve(self, name: str) -> ServedTask:
        """The version that a name stands for now, held until `release`."""
        with self._lock:
            task = self._state.served.get(name)
            if task is None:
                if name in self._state.refused:
                    raise PromptQuarantined(
                        f"This task's prompt file was refused ({self._state.refused[name].code}); see GET /v1/tasks.",
                        param="task",
                    )
                raise PromptNotFound("No such task. GET /v1/tasks lists those that are served.", param="task")
            usage = self._state.usage[name]
            usage.hits += 1
            usage.last_used = time.monotonic()
            task.users += 1
            return task

    def release(self, task: ServedTask) -> None:
        with self._lock:
            task.users -= 1
            self._free_if_unused(task)

    def statuses(self) -> list[TaskStatus]:
        """Served and refused tasks, by name."""
        now = time.monotonic()
        with self._lock:
            ready = [self._status(task, now) for task in self._state.served.values()]
            refused = [
                TaskStatus(name=name, state="refused", error=problem) for name, problem in self._state.refused.items()
            ]
        return sorted(ready + refused, key=lambda status: status.name)

    def _status(self, task: ServedTask, now: float) -> TaskStatus:
        usage = self._state.usage[task.ref.name]
        return TaskStatus(
            name=task.ref.name,
            state="ready",
            kind=task.spec.kind,
            version=task.ref.version,
            sha256=task.ref.sha256,
            encoder_length=task.residence.encoder_length,
            decoder_length=task.residence.decoder_length,
            bytes=task.bytes,
            takes_text=task.spec.takes_text,
            takes_premise=task.spec.manifest.takes_premise,
            takes_image=task.spec.takes_image,
            metric=task.metric,
            hits=usage.hits,
            last_used_s=None if usage.last_used is None else round(now - usage.last_used, 3),
        )
