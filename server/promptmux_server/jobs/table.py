"""The table of jobs: SQLite in WAL mode, one file that servers and workers of one machine open at the same time.

A worker claims a job with a lease and prolongs it while it works; a lease that ran out returns the job to the queue, so
a killed worker's job is taken up by another. What a worker says counts only while it holds the lease: each claim is an
attempt with a number, and who comes late with an older one is refused.
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

from promptmux_server.errors import IdempotencyConflict, JobNotFound, LeaseLost
from promptmux_server.jobs.job import Job, JobEvent, State

BUSY_S = 10.0
"""How long a writer waits for another's transaction."""
EVENTS_KEPT = 2000
"""Of each job, the last ones."""
LOST = json.dumps({"code": "worker_lost", "message": "Its workers died. Look at their logs, and ask for it again."})

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, payload TEXT NOT NULL, owner TEXT NOT NULL, priority INTEGER NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, max_attempts INTEGER NOT NULL, created REAL NOT NULL,
    cancel_requested INTEGER NOT NULL DEFAULT 0, result TEXT, error TEXT,
    idempotency_key TEXT, asked_sha256 TEXT NOT NULL, lease_until REAL, UNIQUE (owner, idempotency_key)
);
CREATE INDEX IF NOT EXISTS waiting ON jobs (state, priority DESC, created);
CREATE TABLE IF NOT EXISTS events (
    job TEXT NOT NULL REFERENCES jobs (id), number INTEGER NOT NULL, at REAL NOT NULL, name TEXT NOT NULL,
    data TEXT NOT NULL, PRIMARY KEY (job, number)
) WITHOUT ROWID;
"""
COLUMNS = "id, kind, payload, owner, priority, state, attempts, max_attempts, created, cancel_requested, result, error"


@dataclass(frozen=True)
class Claim:
    """A worker's hold on a job, as it was when it was claimed; `job.attempts` is the attempt's number."""

    job: Job


class JobTable:
    """May be used from any thread and process; every method is one transaction that outlives a power cut."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._clock = path, clock
        with self._connected() as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(SCHEMA)

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
    ) -> Job:
        """Queue a job. An owner's repeated key gives the job that it gave before; raises IdempotencyConflict if it
        asks for something else."""
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
            database.execute(
                "INSERT INTO jobs (id, kind, payload, owner, priority, state, max_attempts, created, idempotency_key, "
                "asked_sha256) VALUES (?, ?, ?, ?, ?, 'queued', ?, ?, ?, ?)",
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
                ),
            )
            self._add_event(database, job_id, "queued", {})
            return self._job(database, job_id)

    def get(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        with self._connected() as database:
            return self._job(database, job_id)

    def newest(self, limit: int, owner: str | None = None) -> list[Job]:
        """The youngest jobs, of one owner or of all."""
        with self._connected() as database:
            rows = database.execute(
                f"SELECT {COLUMNS} FROM jobs WHERE ?1 IS NULL OR owner = ?1 ORDER BY created DESC, rowid DESC LIMIT ?2",
                (owner, limit),
            )
            return [_job_of(row) for row in rows]

    def cancel(self, job_id: str) -> Job:
        """End a job that waits; ask the worker of one that runs to end it; leave alone one that has ended."""
        with self._changing() as database:
            job = self._job(database, job_id)
            if job.state == "queued":
                self._end(database, job_id, "cancelled")
            elif job.state == "running":
                database.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ?", (job_id,))
            return self._job(database, job_id)

    def events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        """What a job has told behind event number `after`; raises JobNotFound."""
        with self._connected() as database:
            self._job(database, job_id)
            rows = database.execute(
                "SELECT number, at, name, data FROM events WHERE job = ? AND number > ? ORDER BY number",
                (job_id, after),
            )
            return [JobEvent(number, at, name, json.loads(data)) for number, at, name, data in rows]

    # -- For workers

    def claim(self, kinds: tuple[str, ...], lease_s: float) -> Claim | None:
        """Take the next job of these kinds, or None. One whose lease ran out waits again, unless it was its last."""
        now = self._clock()
        with self._changing() as database:
            self._give_up_the_lost(database, now)
            marks = ", ".join("?" * len(kinds))
            row = database.execute(
                f"UPDATE jobs SET state = 'running', attempts = attempts + 1, lease_until = ? WHERE id = ("
                f"SELECT id FROM jobs WHERE state = 'queued' AND kind IN ({marks}) "
                "ORDER BY priority DESC, created, rowid LIMIT 1"
                f") RETURNING {COLUMNS}",
                (now + lease_s, *kinds),
            ).fetchone()
            if row is None:
                return None
            job = _job_of(row)
            self._add_event(database, job.id, "started", {"attempt": job.attempts})
            return Claim(job)

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

    def fail(self, claim: Claim, code: str, message: str) -> None:
        """End a job that no further attempt would help; raises LeaseLost."""
        with self._held(claim) as database:
            self._end(database, claim.job.id, "failed", error={"code": code, "message": message})

    def end_cancelled(self, claim: Claim) -> None:
        """Raises LeaseLost."""
        with self._held(claim) as database:
            self._end(database, claim.job.id, "cancelled")

    def give_back(self, claim: Claim) -> None:
        """Let another worker go on, as if this attempt had not been made; raises LeaseLost."""
        with self._held(claim) as database:
            self._requeue(database, claim.job.id)
            database.execute("UPDATE jobs SET max_attempts = max_attempts + 1 WHERE id = ?", (claim.job.id,))

    # -- Within a transaction

    def _give_up_the_lost(self, database: sqlite3.Connection, now: float) -> None:
        lost = database.execute(
            "SELECT id, attempts >= max_attempts, cancel_requested FROM jobs "
            "WHERE state = 'running' AND lease_until < ?",
            (now,),
        ).fetchall()
        for job_id, last, cancel_requested in lost:
            if cancel_requested:
                self._end(database, job_id, "cancelled")
            elif last:
                self._end(database, job_id, "failed", error=json.loads(LOST))
            else:
                self._requeue(database, job_id)

    def _requeue(self, database: sqlite3.Connection, job_id: str) -> None:
        database.execute("UPDATE jobs SET state = 'queued', lease_until = NULL WHERE id = ?", (job_id,))
        self._add_event(database, job_id, "queued", {})

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
            "UPDATE jobs SET state = ?, result = ?, error = ?, lease_until = NULL WHERE id = ?",
            (
                state,
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
        return _job_of(row)

    @contextmanager
    def _held(self, claim: Claim) -> Iterator[sqlite3.Connection]:
        """A transaction of the worker that holds a job's newest attempt; raises LeaseLost."""
        with self._changing() as database:
            job = self._job(database, claim.job.id)
            if job.state != "running" or job.attempts != claim.job.attempts:
                raise LeaseLost("Another worker has this job now, or it has ended: stop working on it.")
            yield database

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._connected() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
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


def _job_of(row: tuple[Any, ...]) -> Job:
    job_id, kind, payload, owner, priority, state, attempts, max_attempts, created, cancel, result, error = row
    return Job(
        id=job_id,
        kind=kind,
        payload=json.loads(payload),
        owner=owner,
        priority=priority,
        state=state,
        attempts=attempts,
        max_attempts=max_attempts,
        created=created,
        cancel_requested=bool(cancel),
        result=None if result is None else json.loads(result),
        error=None if error is None else json.loads(error),
    )
