"""A-03 (a) and (c): processes are killed at every point of every change, and at random. Then the store is whole."""

from __future__ import annotations

import itertools
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from promptmux_prompts import Store, StoreError
from prompts.store_cases import blobs, contents, file_of, kept, live, publish, unfinished
from prompts.store_worker import Workers, workers
from prompts.watched_disk import QuickDisk

Standing = dict[str, tuple[int, bool, bytes]]
"""Version, pinned, file of each name."""

OLD: Standing = {"vqa": (2, False, file_of(2)), "other": (1, False, file_of(9))}

STEPS: dict[str, tuple[dict[str, Any], Standing]] = {
    "publish a version": ({"act": "publish", "name": "vqa", "number": 4}, OLD | {"vqa": (4, False, file_of(4))}),
    "publish a name": ({"act": "publish", "name": "new", "number": 4}, OLD | {"new": (1, False, file_of(4))}),
    "publish a deleted name": ({"act": "publish", "name": "dead", "number": 4}, OLD | {"dead": (2, False, file_of(4))}),
    "publish what stands": ({"act": "publish", "name": "vqa", "number": 2}, OLD),
    "rollback": ({"act": "rollback", "name": "vqa"}, OLD | {"vqa": (1, False, file_of(1))}),
    "delete": ({"act": "delete", "name": "vqa"}, {"other": OLD["other"]}),
    "pin": ({"act": "pin", "name": "vqa"}, OLD | {"vqa": (2, True, file_of(2))}),
    "collect": ({"act": "collect"}, OLD),
}


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with workers(tmp_path_factory.mktemp("log") / "said") as started:
        yield started


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions of a name of which the second stands, another name, and a deleted one."""
    root = tmp_path_factory.mktemp("before") / "registry"
    root.mkdir()
    store = opened(root)
    for number in (1, 2, 3):
        publish(store, "vqa", number)
    store.rollback("vqa", author="x")
    publish(store, "other", 9)
    publish(store, "dead", 7)
    store.delete("dead", author="x")
    return root


def opened(root: Path) -> Store:
    return Store.open(root, keep_versions=100, disk=QuickDisk(root))


def standing(store: Store) -> Standing:
    """What every name stands for; every version that is listed must be readable."""
    return {name: (head.version, head.pinned, kept(store, name)[head.version]) for name, head in live(store).items()}


def check_recovered(root: Path) -> Standing:
    """Start again, and find nothing damaged, nothing left over, and nothing missing."""
    store = opened(root)
    assert store.recover().damaged == ()
    assert unfinished(root) == []
    found = standing(store)
    store.collect(older_than_s=0)
    assert standing(store) == found
    assert blobs(root) == {record.file_sha256 for name in found for record in store.versions(name)}
    return found


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_point_a_name_stands_for_the_old_or_the_new(
    before: Path, tmp_path: Path, forked: Workers, step: str
) -> None:
    how, new = STEPS[step]
    stood = []
    for nth in itertools.count(1):
        root = shutil.copytree(before, tmp_path / str(nth))
        said = len(forked.said())
        code = forked.run("step", root=str(root), fault=f"*:kill:{nth}", **how)
        acknowledged = len(forked.said()) > said
        assert code == (0 if acknowledged else -9)
        found = check_recovered(root)
        assert found in ([new] if acknowledged else [OLD, new])
        stood.append(found)
        assert publish(opened(root), "vqa", 5).version in (4, 5)
        if acknowledged:
            break
    assert stood[0] == OLD
    assert nth > (1 if step in ("publish what stands", "collect") else 7)


def test_a_recovery_that_is_killed_anywhere_is_finished_by_the_next(
    before: Path, tmp_path: Path, forked: Workers
) -> None:
    for nth in itertools.count(1):
        root = shutil.copytree(before, tmp_path / str(nth))
        store = opened(root)
        store.blob_path(store.record("vqa", 2)).write_bytes(b"garbage")
        (root / "refs" / "other" / "HEAD.json").write_bytes(b"garbage")
        code = forked.run("step", root=str(root), act="recover", fault=f"*:kill:{nth}")
        opened(root).recover()
        assert contents(store) == {"vqa": (1, file_of(1)), "other": (1, file_of(9))}
        assert (store.recover().damaged, unfinished(root)) == ((), [])
        if code == 0:
            break
    assert nth > 7


class Reader:
    """Reads what names stand for a thousand times a second, and remembers all that was not as it must be."""

    def __init__(self, store: Store, names: list[str]) -> None:
        self._store, self._names = store, names
        self._seen = dict.fromkeys(names, 0)
        self._ended = threading.Event()
        self.reads, self.wrong = 0, list[str]()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for name in itertools.cycle(self._names):
            if self._ended.wait(0.001):
                return
            try:
                self._read(name)
            except StoreError as error:
                self.wrong.append(repr(error))

    def _read(self, name: str) -> None:
        head = self._store.head(name)
        if head is None:
            return
        self._store.read(self._store.record(name, head.version))
        self.reads += 1
        if head.version < self._seen[name]:
            self.wrong.append(f"{name} went back from {self._seen[name]} to {head.version}")
        self._seen[name] = head.version

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.parametrize("kills", [300, pytest.param(1000, marks=pytest.mark.soak)])
def test_random_kills_under_publishers_and_a_reader_lose_and_tear_nothing(tmp_path: Path, kills: int) -> None:
    root, names = tmp_path / "registry", ["a", "b", "c"]
    store = Store.open(root, keep_versions=10**6)
    chance = random.Random(kills)
    with workers(tmp_path / "said") as forked:
        seeds = itertools.count(1)

        def start() -> int:
            return forked.start("publish_for_ever", root=str(root), names=names, seed=next(seeds))

        publishers = [start() for _ in range(4)]
        reader = Reader(store, names)
        for _ in range(kills):
            time.sleep(chance.uniform(0.0, 0.015))
            victim = chance.randrange(4)
            forked.kill(publishers[victim])
            publishers[victim] = start()
        for publisher in publishers:
            forked.kill(publisher)
        reader.stop()
        acknowledged = forked.said()
    assert reader.wrong == []
    assert reader.reads > kills
    assert len(acknowledged) > kills / 10
    assert unfinished(root) != []  # else the kills came at idle moments
    store = Store.open(root, keep_versions=10**6)
    assert store.recover().damaged == ()
    assert unfinished(root) == []
    assert store.collect(older_than_s=0).blobs > 0  # likewise
    listed = {name: kept(store, name) for name in names}
    lost = [ack for ack in acknowledged if listed[ack["name"]].get(ack["version"]) != file_of(ack["number"])]
    assert lost == []
    for name in names:
        newest = max(ack["version"] for ack in acknowledged if ack["name"] == name)
        assert live(store)[name].version >= newest
    assert blobs(root) == {record.file_sha256 for name in names for record in store.versions(name)}
