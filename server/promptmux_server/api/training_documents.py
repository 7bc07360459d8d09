"""Trainings as answers: how jobs and their events are written, and how `/openapi.json` documents them.

Names follow OpenAI's jobs. Nothing here names a folder of the server.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from promptmux_server.api.documents import FAILURES, Document
from promptmux_server.jobs import Job, JobEvent
from promptmux_server.jobs.trainings import TrainingRequest

LOCAL = "local"
"""The author where no key says who asks."""


class Verdict(Document):
    """Whether the prompt was published under `name`, and why or why not."""

    name: str
    published: bool
    reason: str
    version: int | None
    served_score: float | None = Field(description="Of the version that was served before, on the same samples.")


class TrainingResult(Document):
    """`file` lies in the folder of trainings; `publish` is null for a training that did not ask for it."""

    file: str
    sha256: str
    metric: dict[str, Any]
    publish: Verdict | None


class TrainingFailure(Document):
    code: str
    message: str
    param: str | None


class TrainingSummary(Document):
    """A training at one moment. Times are seconds since the epoch."""

    id: str
    object: Literal["training"]
    task: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    cancel_requested: bool
    priority: int
    publish: bool
    author: str
    attempts: int
    max_attempts: int
    created_at: int
    started_at: int | None
    finished_at: int | None
    metadata: dict[str, str]
    result: TrainingResult | None
    error: TrainingFailure | None


class Training(TrainingSummary):
    """The same with its configuration as it was sent."""

    config: str | dict[str, Any]


class TrainingPage(Document):
    """Newest first; `next` is the last of them if more follow, to be sent as `after`."""

    trainings: list[TrainingSummary]
    next: str | None


EVENTS = """id: 2
event: step
data: {"number": 2, "name": "step", "at": 1764104400.25, "data": {"step": 10, "loss": 1.5, ...}}

"""
"""`queued`, `started`, `step`, `score`, `publish`, and last `succeeded`, `failed` or `cancelled`."""

SENDS_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}, "example": EVENTS}}},
    204: {"description": "The training has ended, and nothing follows behind `Last-Event-ID`."},
    **FAILURES,
}
CREATES: dict[int | str, dict[str, Any]] = {201: {"model": Training}, **FAILURES}


def summary(job: Job) -> dict[str, Any]:
    """A job as lists show it."""
    request = TrainingRequest.of(job.payload)
    return {
        "id": job.id,
        "object": "training",
        "task": request.task,
        "status": job.state,
        "cancel_requested": job.cancel_requested,
        "priority": job.priority,
        "publish": request.publish,
        "author": job.owner or LOCAL,
        "attempts": job.attempts,
        "max_attempts": job.max_attempts,
        "created_at": int(job.created),
        "started_at": None if job.started is None else int(job.started),
        "finished_at": None if job.finished is None else int(job.finished),
        "metadata": dict(request.metadata),
        "result": None if job.result is None else _placeless(dict(job.result), request.folder),
        "error": None if job.error is None else _placeless({"param": None, **job.error}, request.folder),
    }


def whole(job: Job) -> dict[str, Any]:
    """A job with its configuration: an object if that was sent, else TOML."""
    request = TrainingRequest.of(job.payload)
    is_json = request.name.endswith(".json")
    return {**summary(job), "config": json.loads(request.config) if is_json else request.config}


def event_lines(event: JobEvent, folder: str) -> bytes:
    """One server-sent event."""
    told = {"number": event.number, "name": event.name, "at": round(event.at, 3)}
    data = json.dumps({**told, "data": _placeless(dict(event.data), folder)})
    return f"id: {event.number}\nevent: {event.name}\ndata: {data}\n\n".encode()


def _placeless(told: dict[str, Any], folder: str) -> dict[str, Any]:
    """What a worker has told, with paths as they are within the job's folder."""
    for key in told.keys() & {"file", "message"}:
        told[key] = str(told[key]).replace(f"{folder}/", "")
    if str(told.get("file", "")).startswith("/"):  # of a job that was queued on this machine, and writes elsewhere
        told["file"] = Path(told["file"]).name
    return told
