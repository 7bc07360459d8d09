"""How jobs lie in SQLite: tables, columns that were added since the first version, and a row as a `Job`."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from promptmux_server.jobs.job import Job

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, payload TEXT NOT NULL, owner TEXT NOT NULL, priority INTEGER NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, max_attempts INTEGER NOT NULL, created REAL NOT NULL,
    cancel_requested INTEGER NOT NULL DEFAULT 0, result TEXT, error TEXT,
    idempotency_key TEXT, asked_sha256 TEXT NOT NULL, lease_until REAL, started REAL, finished REAL, folder TEXT,
    not_before REAL, claims INTEGER NOT NULL DEFAULT 0, UNIQUE (owner, idempotency_key)
);
CREATE INDEX IF NOT EXISTS waiting ON jobs (state, priority DESC, created);
CREATE TABLE IF NOT EXISTS events (
    job TEXT NOT NULL REFERENCES jobs (id), number INTEGER NOT NULL, at REAL NOT NULL, name TEXT NOT NULL,
    data TEXT NOT NULL, PRIMARY KEY (job, number)
) WITHOUT ROWID;
"""
COLUMNS = (
    "id, kind, payload, owner, priority, state, attempts, max_attempts, created, started, finished, cancel_requested, "
    "result, error"
)
ADDED = ("started REAL", "finished REAL", "folder TEXT", "not_before REAL", "claims INTEGER NOT NULL DEFAULT 0")
"""Columns that tables of earlier versions have not."""


def prepare(database: sqlite3.Connection) -> None:
    """Make what is missing."""
    database.executescript(SCHEMA)
    present = {column[1] for column in database.execute("PRAGMA table_info(jobs)")}
    for column in ADDED:
        if column.split()[0] not in present:
            database.execute(f"ALTER TABLE jobs ADD COLUMN {column}")


def job_of(row: tuple[Any, ...]) -> Job:
    (job_id, kind, payload, owner, priority, state, attempts, max_attempts,
     created, started, finished, cancel, result, error) = row  # fmt: skip
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
        started=started,
        finished=finished,
        cancel_requested=bool(cancel),
        result=None if result is None else json.loads(result),
        error=None if error is None else json.loads(error),
    )
