"""`promptmux worker`: takes training jobs from the table and runs them in this process, one after another.

While a job runs, a thread keeps its lease. A worker that dies loses it, and the next one goes on from the checkpoint;
a worker that is asked to stop keeps a checkpoint and gives the job back. A table that takes no change is waited for.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch

from promptmux_prompts import Prompt
from promptmux_server.cli.machine import usable_cores
from promptmux_server.cli.published import published
from promptmux_server.cli.training_scores import keep_learned, score_served
from promptmux_server.cli.worker_publishing import publish
from promptmux_server.errors import CheckpointNotWritten, Internal, LeaseLost, PromptmuxError, RunHeld
from promptmux_server.jobs import Claim, JobTable
from promptmux_server.jobs.trainings import KIND, TrainingRequest
from promptmux_server.pocket import WEIGHTS
from promptmux_server.training.curve import write_durably
from promptmux_server.training.job import Event, Job, Scored, Stepped, Stopped, held
from promptmux_server.training.job_config import kept_as
from promptmux_server.training.job_parts import open_backbone

LEASE_S = 60.0
BEAT_S = 2.0
"""Between two looks whether a job was cancelled, at most; each prolongs the lease."""
HELD_S = 15.0
"""Before a job is tried again whose folder another process trains in; those behind it do not wait."""
FULL_S = 600.0
"""Before a job is tried again whose checkpoint the disk did not take: time for somebody to make room."""
TOLD_EVERY_S = 1.0
"""Between two steps that a job tells of; scores are told always."""

Stop = Callable[[], bool]
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


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
        while not self._done.wait(min(BEAT_S, self._lease_s / 4)):
            try:
                self.beat()
            except LeaseLost:
                return
            except sqlite3.OperationalError:
                continue  # a disk or a table that is busy: there is time for another try before the lease ends

    def beat(self) -> None:
        """Prolong it, and learn whether the job was cancelled; raises LeaseLost."""
        try:
            self.cancelled |= self._table.prolong(self._claim, self._lease_s)
        except LeaseLost:
            self.lost = True
            raise


def work(
    table: JobTable,
    stop: Stop,
    *,
    once: bool = False,
    url: str | None = None,
    lease_s: float = LEASE_S,
    idle_s: float = 1.0,
) -> int:
    """Run jobs until told to stop, or with `once` until none waits; how many were taken.

    `url` is the server that prompts are published into; None: nowhere. `idle_s` lies between two looks at a table that
    has no job or takes no change.
    """
    taken = 0
    try:
        while not stop():
            claim = _until_written(lambda: table.claim((KIND,), lease_s), stop, idle_s)
            if claim is None:
                if once:
                    break
                time.sleep(idle_s)
                continue
            taken += _work_on(table, claim, stop, url, lease_s, idle_s)
    except sqlite3.OperationalError:
        log.error("Stopped while the table took no change: a job that ran is taken up again from its checkpoint.")
    return taken


def _until_written(write: Callable[[], Answer], stop: Stop, pause_s: float) -> Answer:
    """Change the table, again and again while its disk is full or others keep it busy.

    Raises sqlite3.OperationalError when asked to stop meanwhile, and what `write` raises otherwise.
    """
    told = False
    while True:
        try:
            return write()
        except sqlite3.OperationalError as error:
            if stop():
                raise
            if not told:
                log.warning("The table of jobs takes no change (%s); it is tried again until it does.", error)
                told = True
        time.sleep(pause_s)


def _work_on(table: JobTable, claim: Claim, stop: Stop, url: str | None, lease_s: float, pause_s: float) -> bool:
    """Whether the job could be begun."""
    lease = _Lease(table, claim, lease_s)
    begun, end = True, partial(table.give_back, claim)
    with suppress(LeaseLost):  # then another worker has it, and goes on from the checkpoint
        try:
            with lease.kept():
                result = _run(table, claim, lease, stop, url, pause_s)
            if result is not None:
                end = partial(table.succeed, claim, result)
        except RunHeld:  # by `promptmux train`, or by a worker that has not noticed its lost lease
            begun, end = False, partial(table.give_back, claim, HELD_S)
        except (LeaseLost, sqlite3.Error):
            raise
        except CheckpointNotWritten as error:
            end = partial(table.fail, claim, error.code, error.message, again_in_s=FULL_S)
        except PromptmuxError as error:
            end = partial(table.fail, claim, error.code, error.message)
        except Exception:  # a number that no tensor has room for, or a bug: the jobs behind it are not to blame
            log.exception("job %s failed", claim.job.id)
            end = partial(table.fail, claim, Internal.code, "The worker failed on this job; its log says why.")
        _until_written(end, stop, pause_s)
    return begun


def _run(
    table: JobTable, claim: Claim, lease: _Lease, stop: Stop, url: str | None, pause_s: float
) -> dict[str, Any] | None:
    """One job to its end; None if it was stopped before."""
    request = TrainingRequest.of(claim.job.payload)
    config = request.parsed()
    torch.set_num_threads(config.machine.threads or usable_cores())
    with held(config):
        _until_written(lambda: table.begin(claim), stop, pause_s)
        with Job(config, open_backbone(config, WEIGHTS), score_served, published) as job:
            job.resume()
            write_durably(config.output / kept_as(request.name), request.config.encode())
            tell = _teller(table, claim)
            for event in job.events(lambda: stop() or lease.cancelled or lease.lost):
                if isinstance(event, Stopped):
                    return None
                tell(event)
            kept, verdict = keep_learned(job), None
            if request.publish:
                # Nothing is published for a job that was cancelled, or is another worker's by now.
                _until_written(lease.beat, stop, pause_s)
                if lease.cancelled:
                    return None
                assert isinstance(kept.learned, Prompt), "a configuration that trains weights asks for no publication"
                verdict = publish(job, kept.learned, url)
                with suppress(sqlite3.OperationalError):  # the result says it too
                    table.tell(claim, "publish", verdict)
            return {**kept.told(), "publish": verdict}


def _teller(table: JobTable, claim: Claim) -> Callable[[Event], None]:
    """Writes a run's events into the table, steps not too often."""
    last_s = 0.0

    def tell(event: Event) -> None:
        nonlocal last_s
        with suppress(sqlite3.OperationalError):  # a disk that is full costs a line of the events, not the training
            if isinstance(event, Scored):
                table.tell(claim, "score", {"step": event.step, "best": event.best, **asdict(event.score)})
            elif isinstance(event, Stepped) and time.monotonic() - last_s >= TOLD_EVERY_S:
                last_s = time.monotonic()
                table.tell(claim, "step", asdict(event.report))

    return tell
