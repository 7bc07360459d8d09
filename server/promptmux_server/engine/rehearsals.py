"""Rehearsals waiting for the engine's thread, which alone may use the model: one pass a turn, between its own.

Owns the handover and who is told what. Knows nothing of what a rehearsal plays.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from promptmux_server.engine.device_faults import is_device_lost
from promptmux_server.engine.rehearsal import Passes

Reason = Callable[[], Exception]


class Rehearsals:
    """Any thread asks; the engine's thread plays. `wake` ends the engine's sleep."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: deque[tuple[Passes, Future[None]]] = deque()
        self._closed: Reason | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def run(self, passes: Passes) -> None:
        """Have it played to its end; raises what it raises, or why nothing is played any more."""
        done: Future[None] = Future()
        with self._lock:
            if self._closed is not None:
                raise self._closed()
            self._waiting.append((passes, done))
        self._wake()
        done.result()

    def step(self) -> None:
        """Play one pass of the first. Its failure is its own, unless the device is lost. For the engine's thread."""
        with self._lock:
            if not self._waiting:
                return
            passes, done = self._waiting[0]
        try:
            next(passes)
        except StopIteration:
            self._end(done, None)
        except Exception as error:
            self._end(done, error)
            if is_device_lost(error):
                raise

    def _end(self, done: Future[None], error: Exception | None) -> None:
        with self._lock:
            if done.done():  # told already that nothing is played any more
                return
            self._waiting.popleft()
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def close(self, reason: Reason) -> None:
        """Tell everyone who waits, and whoever comes later."""
        with self._lock:
            self._closed = reason
            for _, done in self._waiting:
                done.set_exception(reason())
            self._waiting.clear()
