"""What the server says of trainings. Fields that a newer server adds are ignored."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

TrainingStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
LAST_EVENTS = frozenset({"succeeded", "failed", "cancelled"})
"""Names of events behind which nothing comes."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class PublishVerdict(_Model):
    """Whether a trained prompt is served now, and why or why not."""

    name: str
    published: bool
    reason: str
    version: int | None = None
    served_score: float | None = None
    """Of the version that was served before, on the same samples."""


class TrainingResult(_Model):
    """A prompt file, on the server's disk."""

    file: str
    """Within the folder of trainings."""
    sha256: str
    """Of the prompt's content: the one in `Answer.prompt` once it is served."""
    metric: dict[str, Any]
    publish: PublishVerdict | None = None
    """None of a training that did not ask for it."""


class TrainingError(_Model):
    """Why a training failed."""

    code: str
    message: str
    param: str | None = None


class Training(_Model):
    """A training at one moment."""

    id: str
    task: str
    status: TrainingStatus
    cancel_requested: bool = False
    priority: int = 0
    publish: bool = False
    author: str = ""
    """Name of the key that asked for it."""
    attempts: int = 0
    """Times that a worker began it."""
    max_attempts: int = 0
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    metadata: dict[str, str] = {}
    result: TrainingResult | None = None
    error: TrainingError | None = None
    config: str | dict[str, Any] | None = None
    """As it was sent; None in lists."""

    @property
    def ended(self) -> bool:
        return self.status in LAST_EVENTS


class TrainingEvent(_Model):
    """Something that a training told; `number` counts from 1 within the training."""

    number: int
    name: str
    """queued, started, step, score, publish, and last succeeded, failed or cancelled."""
    at: datetime
    data: dict[str, Any]
