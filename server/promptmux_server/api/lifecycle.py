"""Whether the process is on its way out: set by the signal handler, read by routes that then refuse."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Lifecycle:
    """One process's."""

    draining: bool = False
