"""The table of jobs: SQLite in WAL mode, one file that servers and workers of one machine open at the same time.

A worker claims a job with a lease and prolongs it while it works; a lease that ran out returns the job to the queue, so
a killed worker's job is taken up by another. What a worker says counts only while it holds the lease: claims are
numbered, and who comes late with an older one of its job is refused.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptmux_server.errors import IdempotencyConflict, JobConflict, JobNotFound, LeaseLost, TenantQueueFull
from promptmux_server.jobs.job import ENDED, Job, JobEvent, State
from promptmux_server.jobs.schema import COLUMNS, job_of, prepare

FILE = "jobs.sqlite"
"""Of the table, in the directory of what the server keeps: servers, workers and commands so find the same one."""

BUSY_S = 10.0
"""How long a writer waits for another's transaction."""
EVENTS_KEPT = 2000
"""Of each job, the last ones."""
LOST = json.dumps({"code": "worker_lost", "message": "Its workers died. Look at their logs, and ask for it again."})


@dataclass(frozen=True)
class Claim:
    """A worker's hold on a job, as it was when it was claimed; `job.attempts` is the attempt's number."""

    job: Job
    number: int
    """Among all claims of the job; never given twice, as an attempt's number is after `give_back`."""


class JobTable:
    """May be used from any thread and process; every method is one transaction that outlives a power cut."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._clock = path, clock
        with self._connected() as database:
            database.execute("PRAGMA journal_mode = WAL")
            prepare(database)

    # -- For those who ask

    def submit(
        self,
        kind: str,
        payload: Mapping[str, Any],
        *,
        owner: str = "",
        priority: int = 0,
        max_attempts: int = 3,
        idempotency_key: str | None = None,
        folder: str | None = None,
        most_waiting: int | None = None,
    ) -> Job:
        """Queue a job. An owner's repeated key gives the job that it gave before.

        `folder` is what no other job may write to until this one has ended, `most_waiting` how many jobs of its owner
        may wait. Raises IdempotencyConflict for a key that asked for something else, JobConflict, TenantQueueFull.
        """
        asked = json.dumps([kind, payload, priority], sort_keys=True)
        sha256, job_id = hashlib.sha256(asked.encode()).hexdigest(), secrets.token_hex(12)
        with self._changing() as database:
            before = database.execute(
                "SELECT id, asked_sha256 FROM jobs WHERE owner = ? AND idempotency_key = ?", (owner, idempotency_key)
            ).fetchone()
            if before is not None:
                if before[1] != sha256:
                    raise IdempotencyConflict("This idempotency key was used for another job: choose a new one.")
                return self._job(database, before[0])
            self._give_up_the_lost(database, self._clock())
            self._check_free(database, folder)
            self._check_room(database, owner, most_waiting)
            database.execute(
                "INSERT INTO jobs (id, kind, payload, owner, priority, state, max_attempts, created, idempotency_key, "
                "asked_sha256, folder) VALUES (?, ?, ?, ?, ?, 'queued', ?, ?, ?, ?, ?)",
                (
                    job_id,
                    kind,
                    json.dumps(payload),
                    owner,
                    priority,
                    max_attempts,
                    self._clock(),
                    idempotency_key,
                    sha256,
                    folder,
                ),
            )
            self._add_event(database, job_id, "queued", {})
            return self._job(database, job_id)

    def get(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        with self._connected() as database:
            return self._job(database, job_id)

    def newest(
        self,
        limit: int,
        owner: str | None = None,
        *,
        kind: str | None = None,
        state: State | None = None,
        before: str | None = None,
    ) -> list[Job]:
        """The youngest jobs, of one owner, kind or state or of all; `before` is the job behind which a page begins.

        Raises JobNotFound for a `before` that there is not.
        """
        with self._connected() as database:
            if before is not None:
                self._job(database, before)
            rows = database.execute(
                f"SELECT {COLUMNS} FROM jobs WHERE (?1 IS NULL OR owner = ?1) AND (?2 IS NULL OR kind = ?2) "
                "AND (?3 IS NULL OR state = ?3) AND (?4 IS NULL OR rowid < (SELECT rowid FROM jobs WHERE id = ?4)) "
                "ORDER BY rowid DESC LIMIT ?5",
                (owner, kind, state, before, limit),
            )
            return [job_of(row) for row in rows]

    def cancel(self, job_id: str) -> Job:
        """End a job that waits; ask the worker of one that runs to end it; leave alone one that has ended."""
        with self._changing() as database:
            self._give_up_the_lost(database, self._clock())  # or nobody would end one whose worker died
            job = self._job(database, job_id)
            if job.state == "queued":
                self._end(database, job_id, "cancelled")
            elif job.state == "running":
                database.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ?", (job_id,))
            return self._job(database, job_id)

    def events(self, job_id: str, after: int = 0, limit: int = EVENTS_KEPT) -> list[JobEvent]:
        """What a job has told behind event number `after`, the first of it; raises JobNotFound."""
        with self._connected() as database:
            self._state(database, job_id)
            rows = database.execute(
                "SELECT number, at, name, data FROM events WHERE job = ? AND number > ? ORDER BY number LIMIT ?",
                (job_id, after, limit),
            )
            return [JobEvent(number, at, name, json.loads(data)) for number, at, name, data in rows]

    def ended(self, job_id: str) -> bool:
        """Whether a job has told its last event; raises JobNotFound."""
        with self._connected() as database:
            return self._state(database, job_id) in ENDED

    # -- For workers

    def claim(self, kinds: tuple[str, ...], lease_s: float) -> Claim | None:
        """Take the next job of these kinds, or None. One whose lease ran out waits again, unless it was its last.

        It is an attempt from here on, since a worker may die of opening what a job needs.
        """
        now = self._clock()
        with self._changing() as database:
            self._give_up_the_lost(database, now)
            marks = ", ".join("?" * len(kinds))
            row = database.execute(
                "UPDATE jobs SET state = 'running', attempts = attempts + 1, claims = claims + 1, lease_until = ? "
                "WHERE id = ("
                f"SELECT id FROM jobs WHERE state = 'queued' AND kind IN ({marks}) AND COALESCE(not_before, 0) <= ? "
                "ORDER BY priority DESC, created, rowid LIMIT 1"
                f") RETURNING claims, {COLUMNS}",
                (now + lease_s, *kinds, now),
            ).fetchone()
            return None if row is None else Claim(job_of(row[1:]), number=row[0])

    def begin(self, claim: Claim) -> None:
        """Tell that the work on a job has begun; raises LeaseLost."""
        with self._held(claim) as database:
            database.execute(
                "UPDATE jobs SET started = COALESCE(started, ?) WHERE id = ?", (self._clock(), claim.job.id)
            )
            self._add_event(database, claim.job.id, "started", {"attempt": claim.job.attempts})

    def prolong(self, claim: Claim, lease_s: float) -> bool:
        """Keep a job for longer; whether it should be ended instead. Raises LeaseLost."""
        with self._held(claim) as database:
            database.execute("UPDATE jobs SET lease_until = ? WHERE id = ?", (self._clock() + lease_s, claim.job.id))
            return self._job(database, claim.job.id).cancel_requested

    def tell(self, claim: Claim, name: str, data: Mapping[str, Any]) -> None:
        """Add an event; raises LeaseLost."""
        with self._held(claim) as database:
            self._add_event(database, claim.job.id, name, data)

    def succeed(self, claim: Claim, result: Mapping[str, Any]) -> None:
        """Raises LeaseLost."""
        with self._held(claim) as database:
            self._end(database, claim.job.id, "succeeded", result=result)

    def fail(self, claim: Claim, code: str, message: str, *, again_in_s: float | None = None) -> None:
        """End a job that no further attempt would help; raises LeaseLost.

        With `again_in_s` one might: the job waits so long and is tried again, until it has no attempt left.
        """
        job, error = claim.job, {"code": code, "message": message}
        with self._held(claim) as database:
            if again_in_s is None or job.attempts >= job.max_attempts:
                self._end(database, job.id, "failed", error=error)
            else:
                self._requeue(database, job.id, again_in_s, why=error)

    def give_back(self, claim: Claim, for_s: float = 0.0) -> None:
        """Let another worker go on, as if this attempt had not been made, or end a job that is to be cancelled.

        For `for_s` the job lets those behind it go first, whatever its priority. Nothing is told of one that was not
        begun. Raises LeaseLost.
        """
        with self._held(claim) as database:
            database.execute("UPDATE jobs SET attempts = attempts - 1 WHERE id = ?", (claim.job.id,))
            self._requeue(database, claim.job.id, for_s)

    # -- Within a transaction

    def _check_free(self, database: sqlite3.Connection, folder: str | None) -> None:
        other = database.execute(
            "SELECT id FROM jobs WHERE folder = ? AND state IN ('queued', 'running')", (folder,)
        ).fetchone()
        if other is not None:
            raise JobConflict(
                f"Job {other[0]} has not ended and writes to the same folder: choose another `output`, or wait."
            )

    def _check_room(self, database: sqlite3.Connection, owner: str, most_waiting: int | None) -> None:
        if most_waiting is None:
            return
        (waiting,) = database.execute(
            "SELECT COUNT(*) FROM jobs WHERE owner = ? AND state = 'queued'", (owner,)
        ).fetchone()
        if waiting >= most_waiting:
            raise TenantQueueFull(f"{waiting} of your jobs wait already: cancel some, or wait.", retry_after_s=30)

    def _give_up_the_lost(self, database: sqlite3.Connection, now: float) -> None:
        lost = database.execute(
            "SELECT id, attempts >= max_attempts AND NOT cancel_requested FROM jobs "
            "WHERE state = 'running' AND lease_until < ?",
            (now,),
        ).fetchall()
        for job_id, failed in lost:
            if failed:
                self._end(database, job_id, "failed", error=json.loads(LOST))
            else:
                self._requeue(database, job_id)

    def _requeue(
        self, database: sqlite3.Connection, job_id: str, for_s: float = 0.0, why: Mapping[str, Any] | None = None
    ) -> None:
        """Have a job wait again, or end it if somebody asked its worker to."""
        if self._job(database, job_id).cancel_requested:
            self._end(database, job_id, "cancelled")
            return
        database.execute(
            "UPDATE jobs SET state = 'queued', lease_until = NULL, not_before = ? WHERE id = ?",
            (self._clock() + for_s if for_s else None, job_id),
        )
        (last_told,) = database.execute(
            "SELECT name FROM events WHERE job = ? ORDER BY number DESC LIMIT 1", (job_id,)
        ).fetchone()
        if why or last_told != "queued":  # tries that do not begin, however many, push no other events out
            self._add_event(database, job_id, "queued", why or {})

    def _end(
        self,
        database: sqlite3.Connection,
        job_id: str,
        state: State,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> None:
        database.execute(
            "UPDATE jobs SET state = ?, finished = ?, result = ?, error = ?, lease_until = NULL WHERE id = ?",
            (
                state,
                self._clock(),
                None if result is None else json.dumps(result),
                None if error is None else json.dumps(error),
                job_id,
            ),
        )
        self._add_event(database, job_id, state, result or error or {})

    def _add_event(self, database: sqlite3.Connection, job_id: str, name: str, data: Mapping[str, Any]) -> None:
        (last,) = database.execute("SELECT COALESCE(MAX(number), 0) FROM events WHERE job = ?", (job_id,)).fetchone()
        database.execute(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?)", (job_id, last + 1, self._clock(), name, json.dumps(data))
        )
        database.execute("DELETE FROM events WHERE job = ? AND number <= ?", (job_id, last + 1 - EVENTS_KEPT))

    def _job(self, database: sqlite3.Connection, job_id: str) -> Job:
        row = database.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise JobNotFound("There is no such job.")
        return job_of(row)

    def _state(self, database: sqlite3.Connection, job_id: str) -> State:
        row = database.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise JobNotFound("There is no such job.")
        state: State = row[0]
        return state

    @contextmanager
    def _held(self, claim: Claim) -> Iterator[sqlite3.Connection]:
        """A transaction of the worker that holds a job's newest claim; raises LeaseLost."""
        with self._changing() as database:
            holds = database.execute(
                "SELECT 1 FROM jobs WHERE id = ? AND state = 'running' AND claims = ?", (claim.job.id, claim.number)
            ).fetchone()
            if holds is None:
                raise LeaseLost("Another worker has this job now, or it has ended: stop working on it.")
            yield database

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._connected() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                if database.in_transaction:  # a full disk has ended it already
                    database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)
        try:
            database.execute("PRAGMA synchronous = FULL")  # NORMAL may lose the last transactions in a power cut
            yield database
        finally:
            database.close()
