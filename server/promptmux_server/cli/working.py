"""`promptmux worker`: takes training jobs from the table and runs them in this process, one after another.

While a job runs, a thread keeps its lease. A worker that dies loses it, and the next one goes on from the checkpoint;
a worker that is asked to stop keeps a checkpoint and gives the job back.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from promptmux_server.cli.machine import usable_cores
from promptmux_server.cli.published import published
from promptmux_server.cli.training_scores import keep_prompt, score_served
from promptmux_server.errors import LeaseLost, PromptmuxError, RunHeld
from promptmux_server.jobs import Claim, JobTable
from promptmux_server.pocket import WEIGHTS
from promptmux_server.training.curve import write_durably
from promptmux_server.training.job import Event, Job, Scored, Stepped, Stopped
from promptmux_server.training.job_config import parse_job
from promptmux_server.training.job_parts import open_backbone

KIND = "training"
LEASE_S = 60.0
TOLD_EVERY_S = 1.0
"""Between two steps that a job tells of; scores are told always."""

Stop = Callable[[], bool]


class _Lease:
    """Kept alive by a thread of its own, which also learns why the job should end."""

    def __init__(self, table: JobTable, claim: Claim, lease_s: float) -> None:
        self._table, self._claim, self._lease_s = table, claim, lease_s
        self._done = threading.Event()
        self.cancelled = self.lost = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _keep(self) -> None:
        while not self._done.wait(self._lease_s / 4):
            try:
                self.cancelled |= self._table.prolong(self._claim, self._lease_s)
            except LeaseLost:
                self.lost = True
                return
            except sqlite3.OperationalError:
                continue  # a disk or a table that is busy: there is time for another try before the lease ends


def work(table: JobTable, stop: Stop, *, once: bool = False, lease_s: float = LEASE_S, idle_s: float = 1.0) -> int:
    """Run jobs until told to stop, or with `once` until none waits; how many were taken."""
    taken = 0
    while not stop():
        claim = table.claim((KIND,), lease_s)
        if claim is None:
            if once:
                break
            time.sleep(idle_s)
            continue
        if _work_on(table, claim, stop, lease_s):
            taken += 1
        elif once:
            break
        else:
            time.sleep(idle_s)
    return taken


def _work_on(table: JobTable, claim: Claim, stop: Stop, lease_s: float) -> bool:
    """Whether the job could be begun."""
    lease = _Lease(table, claim, lease_s)
    with suppress(LeaseLost):  # then another worker has it, and goes on from the checkpoint
        try:
            with lease.kept():
                result = _run(table, claim, lambda: stop() or lease.cancelled or lease.lost)
        except RunHeld:
            table.give_back(claim)  # a worker that lost its lease has not noticed yet
            return False
        except LeaseLost:
            raise
        except PromptmuxError as error:
            table.fail(claim, error.code, error.message)
            return True
        if result is not None:
            table.succeed(claim, result)
        elif lease.cancelled:
            table.end_cancelled(claim)
        else:
            table.give_back(claim)
    return True


def _run(table: JobTable, claim: Claim, stop: Stop) -> dict[str, Any] | None:
    """One job to its end; None if it was stopped before."""
    payload = claim.job.payload
    config = parse_job(payload["config"], payload["name"], Path(payload["folder"]))
    torch.set_num_threads(config.machine.threads or usable_cores())
    with Job(config, open_backbone(config, WEIGHTS), score_served, published) as job:
        job.resume()
        write_durably(config.output / "config.toml", payload["config"].encode())
        tell = _teller(table, claim)
        for event in job.events(stop):
            if isinstance(event, Stopped):
                return None
            tell(event)
        path, prompt = keep_prompt(job)
    return {"file": str(path), "sha256": prompt.digest, "metric": prompt.manifest.metric}


def _teller(table: JobTable, claim: Claim) -> Callable[[Event], None]:
    """Writes a run's events into the table, steps not too often."""
    last_s = 0.0

    def tell(event: Event) -> None:
        nonlocal last_s
        if isinstance(event, Scored):
            table.tell(claim, "score", {"step": event.step, "best": event.best, **asdict(event.score)})
        elif isinstance(event, Stepped) and time.monotonic() - last_s >= TOLD_EVERY_S:
            last_s = time.monotonic()
            table.tell(claim, "step", asdict(event.report))

    return tell
