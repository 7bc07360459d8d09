"""The routes of trainings: ask for one, look at it, follow it, end it. A worker's process does the work.

Owns what may be asked for over HTTP, and keeps the table of jobs off the event loop. What a training is, is `jobs`' and
`training`'s.
"""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, get_args

import anyio
import structlog
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from promptmux_server.api.body import read_json
from promptmux_server.api.conditions import idempotency_key, page
from promptmux_server.api.documents import answers, takes
from promptmux_server.api.lifecycle import Lifecycle
from promptmux_server.api.schemas import TrainingPost, parse_training
from promptmux_server.api.training_documents import CREATES, SENDS_EVENTS, Training, TrainingPage, summary, whole
from promptmux_server.api.training_events import PAGE, EventStream, Told, last_event
from promptmux_server.errors import (
    Draining,
    InvalidParameter,
    JobNotFound,
    Overloaded,
    StorageFailed,
    StorageFull,
    TrainingConfigError,
    TrainingsOff,
)
from promptmux_server.jobs import FILE, Job, JobTable, State
from promptmux_server.jobs.trainings import KIND, TrainingRequest, submit
from promptmux_server.settings import Settings
from promptmux_server.training.confinement import check_output
from promptmux_server.training.job_config import JobConfig

THREADS = 4
"""Calls of the table at one time."""
MOST_WATCHERS = 64
"""Streams of events at one time."""
MOST_CONFIG_BYTES = 256 * 1024
"""A closed set of 3,129 answers takes 40 KB."""
DEFAULT_PAGE, LARGEST_PAGE = 20, 100

OFF = (
    "This server takes no trainings: its operator names a folder for their data and results in PROMPTMUX_TRAINING_ROOT."
)

Result = TypeVar("Result")

log = structlog.get_logger(__name__)


class Trainings:
    """What the routes share."""

    def __init__(self, settings: Settings, lifecycle: Lifecycle) -> None:
        self._path, self._root = settings.state / FILE, settings.training_root
        self._most_waiting, self._lifecycle = settings.trainings_per_key, lifecycle
        self._threads = anyio.CapacityLimiter(THREADS)
        self._watchers = 0
        self._opened: JobTable | None = None

    @property
    def draining(self) -> bool:
        return self._lifecycle.draining

    async def submit(self, request: Request) -> Job:
        """Raises TrainingsOff, TrainingConfigError, and what `JobTable.submit` does."""
        if self.draining:
            raise Draining("The server is shutting down. Send this to another replica.", retry_after_s=5)
        key, post = idempotency_key(request), parse_training(await read_json(request))
        if self._root is None:
            raise TrainingsOff(OFF)
        owner, root = request.scope.get("promptmux.key", ""), self._root

        def do() -> Job:
            wanted, config = _checked(post, root)
            return submit(
                JobTable(self._path),
                wanted,
                config.output,
                owner=owner,
                priority=post.priority,
                idempotency_key=key,
                most_waiting=self._most_waiting,
            )

        return await self._run(do)

    async def find(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        return await self._run(lambda: _training(self._table(), job_id))

    async def cancel(self, job_id: str) -> Job:
        """Raises JobNotFound."""

        def do() -> Job:
            table = self._table()
            return table.cancel(_training(table, job_id).id)

        return await self._run(do)

    async def newest(self, limit: int, state: State | None, before: str | None) -> list[Job]:
        """Raises JobNotFound for a `before` that there is not."""

        def do() -> list[Job]:
            if before is None and not self._path.exists():
                return []
            return self._table().newest(limit, kind=KIND, state=state, before=before)

        return await self._run(do)

    async def told(self, job_id: str, after: int) -> Told:
        """Raises JobNotFound."""

        def do() -> Told:
            table = self._table()
            ended = table.ended(job_id)  # before the events: so an end is never seen without the last of them
            events = table.events(job_id, after, PAGE)
            return Told(events, ended and len(events) < PAGE)

        return await self._run(do)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Be one of those who follow; raises Overloaded."""
        if self._watchers >= MOST_WATCHERS:
            raise Overloaded("Too many follow trainings at this moment.")
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1

    def _table(self) -> JobTable:
        """To read what is there; a table that nobody has made holds no job."""
        if not self._path.exists():
            raise JobNotFound("There is no such job.")
        self._opened = self._opened or JobTable(self._path)
        return self._opened

    async def _run(self, do: Callable[[], Result]) -> Result:
        def run() -> Result:
            with _disk_faults():
                return do()

        return await anyio.to_thread.run_sync(run, limiter=self._threads)


def _checked(post: TrainingPost, root: Path) -> tuple[TrainingRequest, JobConfig]:
    """A job that may be queued; raises TrainingConfigError as `promptmux train` does, with the field in `param`."""
    is_text = isinstance(post.config, str)
    text, name = (str(post.config), "config.toml") if is_text else (json.dumps(post.config), "config.json")
    if not root.is_dir():
        raise StorageFailed("The server's folder for trainings is not there; its operator has to make it.")
    request = TrainingRequest(
        config=text, name=name, folder=str(root.resolve()), task="", confined=True, metadata=post.metadata
    )
    try:
        if len(text.encode()) > MOST_CONFIG_BYTES:
            raise TrainingConfigError(f"A configuration has at most {MOST_CONFIG_BYTES} bytes.")
        config = request.parsed()
        check_output(config)
    except TrainingConfigError as error:
        param = "config" if error.param is None else f"config.{error.param}"
        message = "".join(c if c.isascii() and c.isprintable() else " " for c in error.message)
        raise TrainingConfigError(message, param=param, details=error.details) from error
    return replace(request, task=config.task.name, publish=config.asks_to_be_published), config


def _training(table: JobTable, job_id: str) -> Job:
    job = table.get(job_id)
    if job.kind != KIND:
        raise JobNotFound("There is no such job.")
    return job


@contextmanager
def _disk_faults() -> Iterator[None]:
    """What the disk refuses as errors of the server's; raises StorageFull, StorageFailed."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        log.error("table of jobs", reason=str(error))
        if (
            getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            or getattr(error, "errno", 0) == errno.ENOSPC
        ):
            raise StorageFull("The disk has no room for the table of jobs; nothing has changed.") from error
        raise StorageFailed("The table of jobs cannot be used now; nothing has changed.") from error


def add_trainings(app: FastAPI, desk: Trainings) -> None:
    """Register the routes."""
    _add_following(app, desk)

    @app.post(
        "/v1/trainings",
        summary="Queue a training",
        status_code=201,
        responses=CREATES,
        openapi_extra=takes(TrainingPost),
    )
    async def create(request: Request) -> Response:
        job = await desk.submit(request)
        return JSONResponse(whole(job), 201, {"Location": f"/v1/trainings/{job.id}"})

    @app.get("/v1/trainings", summary="Trainings, newest first", responses=answers(TrainingPage))
    async def listing(request: Request) -> Response:
        after, limit = page(request, default=DEFAULT_PAGE, largest=LARGEST_PAGE)
        found = await desk.newest(limit + 1, _status(request), after or None)
        following = found[limit - 1].id if len(found) > limit else None
        return JSONResponse({"trainings": [summary(job) for job in found[:limit]], "next": following})

    @app.get("/v1/trainings/{id}", summary="One training", responses=answers(Training))
    async def one(id: str) -> Response:
        return JSONResponse(whole(await desk.find(id)))

    @app.delete("/v1/trainings/{id}", summary="End a training", responses=answers(Training))
    async def cancel(id: str) -> Response:
        return JSONResponse(whole(await desk.cancel(id)))


def _add_following(app: FastAPI, desk: Trainings) -> None:
    @app.get(
        "/v1/trainings/{id}/events",
        summary="What a training tells, as it is told",
        response_class=Response,
        responses=SENDS_EVENTS,
    )
    async def events(id: str, request: Request) -> Response:
        after, job = last_event(request), await desk.find(id)
        first = await desk.told(id, after)
        if first.complete and not first.events:
            return Response(status_code=204)
        return EventStream(desk, job, first, after)


def _status(request: Request) -> State | None:
    given = request.query_params.get("status")
    for state in get_args(State):
        if given == state:
            found: State = state
            return found
    if given is None:
        return None
    raise InvalidParameter(f"`status` is one of {', '.join(get_args(State))}.", param="status")
