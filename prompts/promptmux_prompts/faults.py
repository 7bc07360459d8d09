"""Fault points: named places where a test makes the process die, fail or wait. They do nothing unless armed.

Owns arming and firing. Reads no environment: whoever reads the command line decides whether arming is allowed.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

_ERRORS = {"eio": errno.EIO, "enospc": errno.ENOSPC}


class FaultInjected(Exception):
    """What a point armed with `raise` raises."""


@dataclass
class _Armed:
    pattern: str
    kind: str
    delay_s: float | None
    """Of a fault that only waits."""
    nth: int | None
    """Fires at this passing only; None: at every passing."""
    passed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def due(self, point: str) -> bool:
        if not fnmatchcase(point, self.pattern):
            return False
        with self.lock:
            self.passed += 1
            return self.nth is None or self.passed == self.nth

    def fire(self, point: str) -> None:
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.delay_s is not None:
            time.sleep(self.delay_s)
        elif self.kind == "raise":
            raise FaultInjected(point)
        else:
            number = _ERRORS[self.kind]
            raise OSError(number, os.strerror(number))


_armed: _Armed | None = None


def fault(point: str) -> None:
    """Pass a point: nothing happens, unless a fault armed for it is due."""
    armed = _armed
    if armed is not None and armed.due(point):
        armed.fire(point)


def arm(spec: str) -> None:
    """Arm `point:kind[:n]`; kinds are kill, eio, enospc, raise and delay_MS, and n is the passing that fires.

    The point may hold wildcards: `publish.*:kill:3` fires at the third of publish's points. Raises ValueError.
    """
    global _armed
    point, _, rest = spec.partition(":")
    kind, colon, nth = rest.partition(":")
    delay_s = None
    if kind.startswith("delay_") and kind[6:].isdecimal():
        delay_s = int(kind[6:]) / 1000
    elif kind not in ("kill", "raise", *_ERRORS):
        kind = ""
    if not (point and kind) or (colon and not nth.isdecimal()):
        raise ValueError("a fault is written point:kind[:n] with kind kill, eio, enospc, raise or delay_MS")
    _armed = _Armed(point, kind, delay_s, int(nth) if nth else None)


def disarm() -> None:
    """Let every point do nothing again."""
    global _armed
    _armed = None
