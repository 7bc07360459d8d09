"""The thread that moves prompts between disk, host and device, one step at a time, as `prompt_tiers` plans it.

Owns the reading and copying, all of it outside every lock, and what becomes of errors there: a version that cannot be
loaded fails alone. Decides nothing about whose turn it is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from promptmux_prompts import Prompt, PromptFileError
from promptmux_server.engine.prompt_copies import PromptCopies
from promptmux_server.engine.prompt_host import own_copy
from promptmux_server.engine.prompt_tiers import Clean, Load, PromptTiers
from promptmux_server.engine.prompt_versions import PromptSource, Version
from promptmux_server.errors import Internal, PromptQuarantined

log = logging.getLogger(__name__)


class PromptLoader:
    """Carries out what the tiers plan; with `start` on a thread of its own, else whenever somebody calls `step`."""

    def __init__(
        self,
        tiers: PromptTiers,
        copies: PromptCopies,
        read: Callable[[PromptSource], Prompt],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`read` gives a version's prompt from its file, or raises PromptFileError or OSError. `on_change` is called on
        the loader's thread, under no lock, when a lease that had to wait may be held or has failed."""
        self._tiers, self._copies, self._read, self._on_change = tiers, copies, read, on_change
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="promptmux-prompts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread after the step it is at; what still waits for a prompt then waits for ever."""
        self._closing = True
        self._tiers.wake_loader()
        if self._thread.ident is not None:
            self._thread.join()

    def step(self) -> bool:
        """Do the next thing that can be done; False = nothing, until something changes."""
        job = self._tiers.plan()
        if isinstance(job, Clean):
            self._copies.zero(job.home)
            self._tiers.cleaned(job)
        elif isinstance(job, Load):
            self._load(job)
        elif job is not None:
            self._fetch(job.version)
        if self._tiers.take_change():
            self._on_change()
        return job is not None

    def _run(self) -> None:
        while not self._closing:
            self._tiers.await_work()
            try:
                while not self._closing and self.step():
                    pass
            except Exception:
                log.exception("the prompt loader failed at a step and goes on")

    def _load(self, job: Load) -> None:
        """Fill the pages that were taken for a version."""
        prompt = job.kept or self._fetch(job.version)
        if prompt is None:
            self._tiers.discard(job)
            return
        try:
            written = self._copies.upload(job.home, prompt)
        except Exception:
            log.exception("a prompt could not be copied to the device")
            self._tiers.discard(job)
            self._tiers.fail(job.version, Internal, "This task's prompt could not be copied to the device.")
        else:
            self._tiers.arrive(replace(job, home=job.home.of(prompt)), written)

    def _fetch(self, version: Version) -> Prompt | None:
        """Disk to host; None if that failed, which those who wait are told."""
        name = version.source.path.name
        try:
            prompt = own_copy(self._read(version.source), self._copies.pinned)
        except (PromptFileError, OSError) as error:
            code = error.code if isinstance(error, PromptFileError) else "invalid_prompt_file"
            log.warning("prompt file %s can no longer be loaded: %s", name, error)
            message = f"This task's prompt file can no longer be loaded ({code}). Publish it again, or roll it back."
            self._tiers.fail(version, PromptQuarantined, message)
            return None
        except Exception:
            log.exception("prompt file %s could not be read", name)
            self._tiers.fail(version, Internal, "This task's prompt could not be read; the reason is logged.")
            return None
        self._tiers.keep(version, prompt)
        return prompt
