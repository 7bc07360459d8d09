"""A-05 and A-28: many threads and processes change few names at once while files are collected, and agree.

Every change is written down while its name is locked, so the log is the true order, and can be checked as if one caller
had made all changes one after the other.
"""

from __future__ import annotations

import fcntl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from promptmux_prompts import ABSENT, Store
from promptmux_prompts.blobs import Blobs
from promptmux_prompts.locks import Locks
from prompts.store_cases import blobs, contents, file_of, kept, live, publish, unfinished
from prompts.store_worker import race_alone, workers
from prompts.watched_disk import QuickDisk

NAMES = ["a", "b", "c", "d", "e"]


def disagreements(changes: list[dict[str, Any]]) -> list[str]:
    """Changes that somebody made at another version than he saw, and version numbers that did not increase."""
    wrong, stands, highest = list[str](), dict[str, int | None](), Counter[str]()
    for change in changes:
        name, version = change["name"], change["version"]
        if stands.get(name) != change["saw"]:
            wrong.append(f"{change} while the name stood for {stands.get(name)}")
        if change["act"] == "p" and version != stands.get(name):
            if version <= highest[name]:
                wrong.append(f"{change} after version {highest[name]}")
            highest[name] = version
        stands[name] = version
    return wrong


@pytest.mark.parametrize("rounds", [64, pytest.param(1024, marks=pytest.mark.soak)])
def test_racing_publishers_agree_while_files_are_collected(tmp_path: Path, rounds: int) -> None:
    root = tmp_path / "registry"
    with workers(tmp_path / "said") as forked:
        collector = forked.start("collect_for_ever", root=str(root), keep_versions=5)
        racers = [
            forked.start("race", root=str(root), names=NAMES, threads=16, rounds=rounds, seed=seed) for seed in (1, 2)
        ]
        assert [forked.wait(racer) for racer in racers] == [0, 0]
        forked.kill(collector)
        said = forked.said()
    outcomes = Counter(line.get("act", "collected") for line in said)
    assert [line for line in said if line.get("act") == "failed"] == []
    assert all(outcomes[act] > 0 for act in ("p", "r", "d", "lost", "collected"))
    changes = [line for line in said if "saw" in line]
    assert disagreements(changes) == []

    store = Store.open(root, keep_versions=5)
    assert store.recover().damaged == ()
    assert unfinished(root) == []
    last = {change["name"]: change["version"] for change in changes}
    standing = live(store)
    assert {name: version for name, version in last.items() if version} == {
        name: head.version for name, head in standing.items()
    }
    published = {(change["name"], change["version"]): change["number"] for change in changes if change["act"] == "p"}
    for name, head in standing.items():
        found = kept(store, name)
        assert found == {version: file_of(published[name, version]) for version in found}
        alive = sorted(v for of, v in published if of == name and head.floor <= v)
        assert set(found) >= {*alive[-5:], head.version}
    store.collect(older_than_s=0)
    assert blobs(root) == {record.file_sha256 for name in standing for record in store.versions(name)}


def test_a_file_that_is_cleared_away_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, collector = opened_quickly(tmp_path), opened_quickly(tmp_path)
    flock, early = fcntl.flock, [True]

    def clear_first(file: int, how: int) -> None:
        if early and how == fcntl.LOCK_EX and unfinished(tmp_path):
            early.clear()
            assert collector.collect(older_than_s=-60).cleared == 1
        flock(file, how)

    monkeypatch.setattr("promptmux_prompts.disk.fcntl.flock", clear_first)
    publish(store, "vqa", 1)
    assert early == []
    assert contents(store) == {"vqa": (1, file_of(1))}


def opened_quickly(root: Path) -> Store:
    return Store.open(root, disk=QuickDisk(root))


class SlowDisk(QuickDisk):
    """Takes its time to sync, so that others come in between."""

    def sync(self, file: int) -> None:
        time.sleep(0.001)


def raced(store: Store, rounds: int) -> list[dict[str, Any]]:
    """Eight threads of this process."""
    said: list[dict[str, Any]] = []
    threads = [threading.Thread(target=race_alone, args=(store, said.append, NAMES, rounds, seed)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_threads_of_one_process_agree(tmp_path: Path) -> None:
    said = raced(Store.open(tmp_path, disk=SlowDisk(tmp_path)), 10)
    assert [line for line in said if line["act"] == "failed"] == []
    assert disagreements([line for line in said if "saw" in line]) == []


def test_control_without_locks_they_do_not_agree(tmp_path: Path) -> None:
    class Lockless(SlowDisk):
        @contextmanager
        def lock(self, place: str, *, shared: bool = False) -> Iterator[None]:
            yield

    said = raced(Store.open(tmp_path, disk=Lockless(tmp_path)), 10)
    assert disagreements([line for line in said if "saw" in line]) != []


def test_one_of_many_creators_wins(tmp_path: Path) -> None:
    store = Store.open(tmp_path, max_names=3, disk=SlowDisk(tmp_path))
    outcomes: list[str] = []

    def create(number: int) -> None:
        try:
            publish(store, f"name-{number % 4}", number, expected=ABSENT)
            outcomes.append("created")
        except Exception as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("created") == 3  # of four names, since the store takes no more
    assert set(outcomes) == {"created", "VersionMismatch", "RegistryFull"}
    assert len(live(store)) == 3


# Collection beside a publisher, stopped at each step that either of them takes.


class SteppedDisk(QuickDisk):
    """Calls `at_step` before each look or change, with the step's number."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.at_step: Callable[[int], None] = lambda number: None
        self.steps = 0

    @contextmanager
    def _folder(self, place: str) -> Iterator[int]:
        self.steps += 1
        self.at_step(self.steps)
        with super()._folder(place) as folder:
            yield folder


def with_an_orphan(root: Path) -> bytes:
    """A store with a name of three versions and the file of a deleted one, which nobody needs."""
    root.mkdir()
    store = Store.open(root, disk=QuickDisk(root))
    for number in (1, 2, 3):
        publish(store, "vqa", number)
    publish(store, "gone", 7)
    store.delete("gone", author="x")
    return file_of(7)


def interleaved(root: Path, first: Callable[[Store], object], second: Callable[[Store], object], step: int) -> bool:
    """Run one operation, and the other while the first is at a step; whether the first took that many."""
    disk = SteppedDisk(root)
    store = Store.open(root, keep_versions=2, disk=disk)
    disk.steps = 0
    other = threading.Thread(target=second, args=(Store.open(root, keep_versions=2, disk=QuickDisk(root)),))

    def at_step(number: int) -> None:
        if number == step:
            other.start()
            other.join(0.1)  # it may have to wait for the first one's locks

    disk.at_step = at_step
    first(store)
    reached = disk.steps >= step
    if reached:
        other.join()
    return reached


def collect(store: Store) -> None:
    store.collect(older_than_s=-60)


def publish_the_orphan(store: Store) -> None:
    publish(store, "new", 7)


def survivors(root: Path, first: Callable[[Store], object], second: Callable[[Store], object]) -> list[bool]:
    """Of a publication beside a collection, at every step: whether its file was still there in the end."""
    found = []
    for step in range(1, 10**6):
        run = root / str(step)
        with_an_orphan(run)
        if not interleaved(run, first, second, step):
            break
        store = Store.open(run, disk=QuickDisk(run))
        found.append(
            not store.recover().damaged and contents(store) == {"vqa": (3, file_of(3)), "new": (1, file_of(7))}
        )
        assert len(kept(store, "vqa")) == 2
    assert len(found) > 10
    return found


def test_a_publication_at_any_step_of_a_collection_survives(tmp_path: Path) -> None:
    assert all(survivors(tmp_path, collect, publish_the_orphan))


def test_a_collection_at_any_step_of_a_publication_spares_it(tmp_path: Path) -> None:
    assert all(survivors(tmp_path, publish_the_orphan, collect))


def test_control_a_collector_that_does_not_look_again_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Blobs, "is_still", lambda *_: True)
    assert not all(survivors(tmp_path, collect, publish_the_orphan))


def test_control_a_collector_that_does_not_wait_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Locks, "alone", lambda self: nullcontext())
    assert not all(survivors(tmp_path, publish_the_orphan, collect))
