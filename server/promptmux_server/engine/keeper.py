"""What the registry does unasked: take back versions whose numbers are not finite, collect what no version needs.

Owns the thread and the counting. What a version falls back to is `publisher`'s, what is unused the store's.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from promptmux_prompts import StoreError
from promptmux_server.engine.request import PromptRef

COLLECT_EVERY_S = 600.0

log = logging.getLogger(__name__)


class Keeper:
    """`finite` and `nonfinite` are for the engine's thread and return at once; the work has a thread of its own."""

    def __init__(
        self, roll_back: Callable[[PromptRef], PromptRef | None], collect: Callable[[], object], limit: int
    ) -> None:
        """`limit`: answers in a row that are not finite before their version is taken back; 0 = never."""
        self._roll_back, self._collect, self._limit = roll_back, collect, limit
        self._streaks: dict[PromptRef, int] = {}
        self._bad: queue.SimpleQueue[PromptRef | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="promptmux-registry", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._bad.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def finite(self, ref: PromptRef) -> None:
        """A version has given a good answer."""
        if self._streaks:
            self._streaks.pop(ref, None)

    def nonfinite(self, ref: PromptRef) -> None:
        """A version has given none."""
        streak = self._streaks.pop(ref, 0) + 1
        if streak == self._limit:
            self._bad.put(ref)
        else:
            self._streaks[ref] = streak

    def _run(self) -> None:
        while True:
            try:
                ref = self._bad.get(timeout=COLLECT_EVERY_S)
            except queue.Empty:
                self._do("collecting unused versions", self._collect)
                continue
            if ref is None:
                return
            self._do(f"taking back prompt {ref.name} version {ref.version}", lambda ref=ref: self._take_back(ref))  # type: ignore[misc]

    def _take_back(self, ref: PromptRef) -> None:
        target = self._roll_back(ref)
        if target is not None:
            log.error(
                "prompt %s: version %d gave numbers that are not finite %d times in a row; rolled back to version %d",
                *(ref.name, ref.version, self._limit, target.version),
            )

    @staticmethod
    def _do(what: str, work: Callable[[], object]) -> None:
        try:
            work()
        except StoreError as error:
            log.error("%s failed: %s", what, error)
        except Exception:
            log.exception("%s failed", what)
