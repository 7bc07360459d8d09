"""What a job is, as its table tells it. Knows no SQL, and nothing of what jobs do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]

ENDED: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job at one moment. Times are seconds since the epoch."""

    id: str
    kind: str
    payload: Mapping[str, Any]
    owner: str
    """Name of the API key that asked for it; "" where there is none."""
    priority: int
    """Higher ones are begun first; of equal ones the older."""
    state: State
    attempts: int
    """Times that a worker took it and did not give it back."""
    max_attempts: int
    created: float
    started: float | None
    """When a worker first began it."""
    finished: float | None
    cancel_requested: bool
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    """`code` and `message`, of a failed job."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True)
class JobEvent:
    """Something that a job told; `number` counts from 1 within the job."""

    number: int
    at: float
    name: str
    data: Mapping[str, Any]
