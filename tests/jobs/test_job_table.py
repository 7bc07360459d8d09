"""The table of jobs: who gets what when, and what becomes of a job whose worker died, was late or was told to stop."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import pytest

from promptmux_server.errors import IdempotencyConflict, JobConflict, JobNotFound, LeaseLost, TenantQueueFull
from promptmux_server.jobs import JobTable
from promptmux_server.jobs import table as table_module

LEASE_S = 30.0
KINDS = ("training",)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(tmp_path: Path, clock: Clock) -> JobTable:
    return JobTable(tmp_path / "state" / "jobs.sqlite", clock)


def names(table: JobTable, job_id: str) -> list[str]:
    return [event.name for event in table.events(job_id)]


def test_a_job_goes_from_queue_to_result_and_tells_of_it(table: JobTable) -> None:
    job = table.submit("training", {"steps": 3}, owner="ann")
    claim = table.claim(KINDS, LEASE_S)
    assert claim is not None
    assert (claim.job.id, claim.job.payload, claim.job.attempts) == (job.id, {"steps": 3}, 1)
    assert table.claim(KINDS, LEASE_S) is None
    table.begin(claim)
    table.tell(claim, "step", {"loss": 0.5})
    table.succeed(claim, {"score": 0.9})
    ended = table.get(job.id)
    assert (ended.state, ended.result, ended.owner, ended.ended) == ("succeeded", {"score": 0.9}, "ann", True)
    assert names(table, job.id) == ["queued", "started", "step", "succeeded"]
    assert [event.number for event in table.events(job.id, after=2)] == [3, 4]


def test_jobs_are_begun_by_priority_then_by_age(table: JobTable) -> None:
    ids = [table.submit("training", {"n": n}, priority=priority).id for n, priority in enumerate((0, 5, 0, 5))]
    claims = [table.claim(KINDS, LEASE_S) for _ in ids]
    assert [claim.job.id for claim in claims if claim] == [ids[1], ids[3], ids[0], ids[2]]


def test_a_worker_gets_only_kinds_that_it_can_do(table: JobTable) -> None:
    table.submit("evaluation", {})
    assert table.claim(KINDS, LEASE_S) is None
    assert table.claim(("evaluation", *KINDS), LEASE_S) is not None


def test_a_key_gives_the_same_job_again_and_no_other(table: JobTable) -> None:
    first = table.submit("training", {"a": 1}, owner="ann", idempotency_key="k")
    assert table.submit("training", {"a": 1}, owner="ann", idempotency_key="k").id == first.id
    assert table.submit("training", {"a": 1}, owner="bob", idempotency_key="k").id != first.id
    assert table.submit("training", {"a": 1}, owner="ann").id != first.id
    with pytest.raises(IdempotencyConflict):
        table.submit("training", {"a": 2}, owner="ann", idempotency_key="k")


def test_a_lease_that_ran_out_returns_the_job_and_its_late_worker_is_refused(table: JobTable, clock: Clock) -> None:
    table.submit("training", {})
    late = table.claim(KINDS, LEASE_S)
    assert late is not None
    clock.now += LEASE_S + 1
    second = table.claim(KINDS, LEASE_S)
    assert second is not None
    assert second.job.attempts == 2
    for act in (
        lambda: table.begin(late),
        lambda: table.prolong(late, LEASE_S),
        lambda: table.tell(late, "step", {}),
        lambda: table.succeed(late, {}),
        lambda: table.fail(late, "x", "y"),
        lambda: table.give_back(late),
    ):
        with pytest.raises(LeaseLost):
            act()
    table.succeed(second, {})
    with pytest.raises(LeaseLost):
        table.succeed(second, {})


def test_a_lease_that_is_prolonged_is_kept(table: JobTable, clock: Clock) -> None:
    table.submit("training", {})
    claim = table.claim(KINDS, LEASE_S)
    assert claim is not None
    for _ in range(3):
        clock.now += LEASE_S - 1
        assert table.prolong(claim, LEASE_S) is False
        assert table.claim(KINDS, LEASE_S) is None


def test_a_job_whose_workers_all_died_fails(table: JobTable, clock: Clock) -> None:
    job = table.submit("training", {}, max_attempts=2)
    for _ in range(2):
        assert table.claim(KINDS, LEASE_S) is not None
        clock.now += LEASE_S + 1
    assert table.claim(KINDS, LEASE_S) is None
    ended = table.get(job.id)
    assert ended.state == "failed"
    assert ended.error is not None
    assert ended.error["code"] == "worker_lost"


def test_a_job_that_is_given_back_costs_no_attempt(table: JobTable, clock: Clock) -> None:
    job = table.submit("training", {}, max_attempts=1)
    claim = table.claim(KINDS, LEASE_S)
    assert claim is not None
    table.give_back(claim)
    again = table.claim(KINDS, LEASE_S)
    assert again is not None
    assert (again.job.id, again.job.attempts, again.job.max_attempts) == (job.id, 1, 1)
    with pytest.raises(LeaseLost):  # the number of the attempt is the same, that of the claim is not
        table.succeed(claim, {})
    clock.now += LEASE_S + 1
    assert table.claim(KINDS, LEASE_S) is None
    assert table.get(job.id).state == "failed"


def test_tries_that_do_not_begin_leave_no_trace(table: JobTable, clock: Clock) -> None:
    job = table.submit("training", {})
    first = table.claim(KINDS, LEASE_S)
    assert first is not None
    table.begin(first)
    table.tell(first, "step", {"step": 1})
    clock.now += LEASE_S + 1
    for _ in range(20):
        claim = table.claim(KINDS, LEASE_S)
        assert claim is not None
        table.give_back(claim, 15.0)
        clock.now += 16.0
    waiting = table.get(job.id)
    assert (waiting.state, waiting.attempts, waiting.max_attempts) == ("queued", 1, 3)
    assert names(table, job.id) == ["queued", "started", "step", "queued"]


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
def test_a_job_that_is_given_back_when_it_is_to_be_cancelled_ends(table: JobTable, begun: bool) -> None:
    job = table.submit("training", {})
    claim = table.claim(KINDS, LEASE_S)
    assert claim is not None
    if begun:
        table.begin(claim)
    table.cancel(job.id)
    table.give_back(claim, 15.0)
    assert table.get(job.id).state == "cancelled"
    assert names(table, job.id)[-1] == "cancelled"


def test_a_failure_that_may_pass_is_tried_again_while_attempts_are_left(table: JobTable, clock: Clock) -> None:
    job = table.submit("training", {}, max_attempts=2)
    for state in ("queued", "failed"):
        claim = table.claim(KINDS, LEASE_S)
        assert claim is not None
        table.begin(claim)
        table.fail(claim, "full", "Make room.", again_in_s=60.0)
        assert table.get(job.id).state == state
        assert table.claim(KINDS, LEASE_S) is None
        clock.now += 61.0
    error = {"code": "full", "message": "Make room."}
    assert names(table, job.id) == ["queued", "started", "queued", "started", "failed"]
    assert [event.data for event in table.events(job.id) if event.data] == [
        {"attempt": 1}, error, {"attempt": 2}, error
    ]  # fmt: skip


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_by_its_worker(table: JobTable, clock: Clock) -> None:
    waiting = table.submit("training", {})
    assert table.cancel(waiting.id).state == "cancelled"
    assert table.claim(KINDS, LEASE_S) is None
    running = table.submit("training", {})
    claim = table.claim(KINDS, LEASE_S)
    assert claim is not None
    assert table.cancel(running.id).state == "running"
    assert table.prolong(claim, LEASE_S) is True
    table.give_back(claim)
    assert table.cancel(running.id).state == "cancelled"
    dying = table.submit("training", {})
    assert table.claim(KINDS, LEASE_S) is not None
    table.cancel(dying.id)
    clock.now += LEASE_S + 1
    assert table.claim(KINDS, LEASE_S) is None
    assert table.get(dying.id).state == "cancelled"


def test_a_folder_is_one_jobs_until_its_end(table: JobTable, clock: Clock) -> None:
    first = table.submit("training", {}, folder="/out")
    with pytest.raises(JobConflict, match=first.id):
        table.submit("training", {}, folder="/out")
    table.submit("training", {}, folder="/other")
    table.submit("training", {})
    table.submit("training", {})
    claim = table.claim(KINDS, LEASE_S)
    assert claim is not None
    table.cancel(first.id)
    with pytest.raises(JobConflict):
        table.submit("training", {}, folder="/out")
    clock.now += LEASE_S + 1  # its worker died, and nobody came after
    assert table.submit("training", {}, folder="/out").state == "queued"
    assert table.get(first.id).state == "cancelled"


def test_a_job_whose_worker_died_is_cancelled_at_once(table: JobTable, clock: Clock) -> None:
    job = table.submit("training", {})
    assert table.claim(KINDS, LEASE_S) is not None
    clock.now += LEASE_S + 1
    assert table.cancel(job.id).state == "cancelled"


def test_only_so_many_of_an_owner_wait(table: JobTable) -> None:
    for _ in range(2):
        table.submit("training", {}, owner="ann", most_waiting=2)
    with pytest.raises(TenantQueueFull):
        table.submit("training", {}, owner="ann", most_waiting=2)
    table.submit("training", {}, owner="bob", most_waiting=2)
    assert table.claim(KINDS, LEASE_S) is not None
    table.submit("training", {}, owner="ann", most_waiting=2)


def test_a_job_that_is_given_back_for_a_while_lets_those_behind_it_go_first(table: JobTable, clock: Clock) -> None:
    first, second = (table.submit("training", {"n": n}, priority=1 - n) for n in range(2))
    claim = table.claim(KINDS, LEASE_S)
    assert claim is not None
    table.give_back(claim, 15.0)
    behind = table.claim(KINDS, LEASE_S)
    assert behind is not None
    assert (claim.job.id, behind.job.id) == (first.id, second.id)
    assert table.claim(KINDS, LEASE_S) is None
    clock.now += 16.0
    again = table.claim(KINDS, LEASE_S)
    assert again is not None
    assert again.job.id == first.id


def test_pages_begin_behind_a_job_and_hold_one_kind_and_state(table: JobTable) -> None:
    ids = [table.submit(kind, {"n": n}).id for n, kind in enumerate(("training", "evaluation", "training"))]
    assert [job.id for job in table.newest(9, kind="training")] == [ids[2], ids[0]]
    assert [job.id for job in table.newest(9, before=ids[2])] == [ids[1], ids[0]]
    table.cancel(ids[0])
    assert [job.id for job in table.newest(9, state="cancelled")] == [ids[0]]
    with pytest.raises(JobNotFound):
        table.newest(9, before="nothing")


def test_a_job_knows_when_it_began_and_ended(table: JobTable, clock: Clock) -> None:
    job = table.submit("training", {})
    assert (job.started, job.finished, table.ended(job.id)) == (None, None, False)
    first = table.claim(KINDS, LEASE_S)
    assert first is not None
    assert table.get(job.id).started is None
    table.begin(first)
    began = table.get(job.id).started
    table.give_back(first)
    again = table.claim(KINDS, LEASE_S)
    assert again is not None
    table.begin(again)
    table.succeed(again, {})
    ended = table.get(job.id)
    assert (ended.started, table.ended(job.id)) == (began, True)
    assert ended.finished is not None
    assert ended.finished > ended.started > ended.created  # type: ignore[operator]


def test_an_unknown_job_is_an_error(table: JobTable) -> None:
    for act in (table.get, table.cancel, table.events, table.ended):
        with pytest.raises(JobNotFound):
            act("nothing")


def test_the_youngest_are_listed_by_owner_or_for_all(table: JobTable) -> None:
    ids = [table.submit("training", {"n": n}, owner=owner).id for n, owner in enumerate(("ann", "bob", "ann"))]
    assert [job.id for job in table.newest(10)] == ids[::-1]
    assert [job.id for job in table.newest(10, "ann")] == [ids[2], ids[0]]
    assert len(table.newest(1)) == 1


def test_events_are_bounded_and_their_numbers_go_on(table: JobTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "EVENTS_KEPT", 5)
    job = table.submit("training", {})
    claim = table.claim(KINDS, LEASE_S)
    assert claim is not None
    for step in range(20):
        table.tell(claim, "step", {"step": step})
    assert [event.number for event in table.events(job.id)] == [17, 18, 19, 20, 21]


def work(path: Path, done: list[str]) -> None:
    table = JobTable(path)
    while (claim := table.claim(KINDS, LEASE_S)) is not None:
        done.append(claim.job.id)
        table.succeed(claim, {})


def test_no_job_is_claimed_twice_by_threads(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    ids = {JobTable(path).submit("training", {"n": n}).id for n in range(40)}
    done: list[list[str]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=work, args=(path, mine)) for mine in done]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    claimed = [job_id for mine in done for job_id in mine]
    assert len(claimed) == 40
    assert set(claimed) == ids


def hold(path: Path) -> None:
    JobTable(path).claim(KINDS, LEASE_S)
    threading.Event().wait()


def test_a_killed_workers_job_is_taken_up_by_another_process(tmp_path: Path) -> None:
    path, clock = tmp_path / "jobs.sqlite", Clock()
    table = JobTable(path)
    job = table.submit("training", {})
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(path,))
    process.start()
    while table.get(job.id).state != "running":
        process.join(0.02)
    process.kill()
    process.join()
    assert table.claim(KINDS, LEASE_S) is None
    clock.now = table.get(job.id).created + 1000.0
    claim = JobTable(path, clock).claim(KINDS, LEASE_S)
    assert claim is not None
    assert (claim.job.id, claim.job.attempts) == (job.id, 2)
