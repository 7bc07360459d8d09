"""A-03 (b): the power fails at any moment of a change, and the disk keeps what it likes of what was not synced.

0 torn, 0 acknowledged but lost; and the same judge finds both in stores that write in another order or sync less.
"""

from __future__ import annotations

import errno
import itertools
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from promptmux_prompts import Head, NameNotFound, StorageFailed, Store, StoreError
from promptmux_prompts.audit import Audit
from promptmux_prompts.refs import Refs
from promptmux_prompts.upload import Upload
from prompts.crash_states import CrashModel, Tree, plant, tree_of
from prompts.store_cases import file_of, kept, live, prompt, publish
from prompts.watched_disk import Change, Failing, QuickDisk, WatchedDisk

Standing = dict[str, tuple[int, bool, bytes]]
"""Version, pinned, file of each name."""

OLD: Standing = {"vqa": (3, False, file_of(2)), "other": (1, False, file_of(9))}

OPERATIONS: dict[str, tuple[Callable[[Store], object], Standing]] = {
    "publish a version": (lambda store: publish(store, "vqa", 3), OLD | {"vqa": (4, False, file_of(3))}),
    "publish a name": (lambda store: publish(store, "new", 3), OLD | {"new": (1, False, file_of(3))}),
    "publish a deleted name": (lambda store: publish(store, "dead", 3), OLD | {"dead": (2, False, file_of(3))}),
    "publish a file that is there": (lambda store: publish(store, "vqa", 9), OLD | {"vqa": (4, False, file_of(9))}),
    "publish what stands": (lambda store: publish(store, "vqa", 2), OLD),
    "rollback": (lambda store: store.rollback("vqa", author="x"), OLD | {"vqa": (2, False, file_of(1))}),
    "delete": (lambda store: store.delete("vqa", author="x"), {"other": (1, False, file_of(9))}),
    "pin": (lambda store: store.set_pinned("vqa", True, author="x"), OLD | {"vqa": (3, True, file_of(2))}),
    "collect": (lambda store: store.collect(older_than_s=-60), OLD),
}


def prepared(root: Path) -> Tree:
    root.mkdir()
    store = Store.open(root, disk=QuickDisk(root))
    for name, number in (("vqa", 0), ("vqa", 1), ("vqa", 2), ("other", 9), ("dead", 7)):
        publish(store, name, number)
    store.delete("dead", author="x")
    return tree_of(root)


def recorded(tree: Tree, root: Path, act: Callable[[Store], object]) -> tuple[list[Change], int]:
    """Every change that an operation makes, and how many had been made when it was acknowledged."""
    changes: list[Change] = []
    plant(tree, root)
    act(Store.open(root, keep_versions=2, disk=WatchedDisk(root, after=changes.append)))
    return changes, len(changes)


def judged(
    tree: Tree,
    changes: list[Change],
    acknowledged: int,
    new: Standing,
    scratch: Path,
    *,
    old: Standing = OLD,
    since: int = 0,
) -> Counter[str]:
    """Cut the power after each change and let a store recover from all that the disk might hold; counts of verdicts."""
    verdicts: Counter[str] = Counter()
    model = CrashModel(tree, ignored=["tmp"])
    seen: set[tuple[bool, frozenset[tuple[str, bytes | None]]]] = set()
    for count in range(len(changes) + 1):
        if count:
            model.apply(changes[count - 1])
        if count < since:
            continue
        done = count >= acknowledged
        for state in model.states():
            key = (done, frozenset(state.items()))
            if key in seen:
                continue
            seen.add(key)
            verdicts[verdict(plant(state, scratch), old, new, done)] += 1
            shutil.rmtree(scratch)
    return verdicts


def verdict(root: Path, old: Standing, new: Standing, done: bool) -> str:
    """Of what a store that starts from this tree serves: "old", "new", "torn", or "lost" what was acknowledged."""
    disk = QuickDisk(root)
    store = Store.open(root, disk=disk)
    if store.recover().damaged:
        return "torn"
    heads = live(store)
    try:
        found = {name: (head.version, head.pinned, kept(store, name)[head.version]) for name, head in heads.items()}
    except StoreError:
        return "torn"
    logged = all(Audit(disk).last_head(name) == store.head(name) for name in {*old, *new})
    if found == new and (logged or not done):
        return "new"
    if found in (old, new):
        return "lost" if done else "old"
    return "torn"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_power_cut_tears_or_loses_anything(tmp_path: Path, operation: str) -> None:
    act, new = OPERATIONS[operation]
    tree = prepared(tmp_path / "before")
    changes, acknowledged = recorded(tree, tmp_path / "run", act)
    verdicts = judged(tree, changes, acknowledged, new, tmp_path / "after")
    assert verdicts["torn"] == verdicts["lost"] == 0
    assert verdicts["new"] > 0
    assert (verdicts["old"] > 0) == (new != OLD)


def test_the_first_publication_of_all_is_as_safe(tmp_path: Path) -> None:
    Store.open(tmp_path / "before")
    empty = tree_of(tmp_path / "before")
    new = {"vqa": (1, False, file_of(1))}
    changes, acknowledged = recorded(empty, tmp_path / "run", lambda store: publish(store, "vqa", 1))
    verdicts = judged(empty, changes, acknowledged, new, tmp_path / "after", old={})
    assert verdicts["torn"] == verdicts["lost"] == 0
    assert verdicts["new"] > 0


@pytest.mark.parametrize("operation", ["publish a version", "publish a name", "delete"])
def test_who_repeats_what_a_killed_process_began_makes_it_last(tmp_path: Path, operation: str) -> None:
    """The killed one left names unsynced, which the next one finds as if they were certain."""
    act, new = OPERATIONS[operation]
    tree = prepared(tmp_path / "before")
    for nth in itertools.count(1):
        changes: list[Change] = []
        root = plant(tree, tmp_path / str(nth))
        disk = WatchedDisk(root, after=changes.append)
        store = Store.open(root, disk=disk)
        disk.before = killed = Killed(nth)
        with suppress(KeyboardInterrupt):
            act(store)
        if killed.left > 0:
            break
        again = Store.open(root, disk=WatchedDisk(root, after=lambda change, to=changes: to.append(renumbered(change))))
        with suppress(NameNotFound):  # deleted already
            act(again)
            verdicts = judged(tree, changes, len(changes), new, tmp_path / "after", since=len(changes))
            assert verdicts.keys() == {"new"}


@pytest.mark.parametrize("operation", ["publish a version", "publish a name", "rollback", "delete"])
def test_a_change_that_failed_tears_nothing_either(tmp_path: Path, operation: str) -> None:
    """The disk failed once, so that the old HEAD was put back, and then the power."""
    act, new = OPERATIONS[operation]
    tree = prepared(tmp_path / "before")
    for nth in itertools.count(1):
        changes: list[Change] = []
        disk = WatchedDisk(plant(tree, tmp_path / str(nth)), after=changes.append)
        store = Store.open(disk.root, disk=disk)
        disk.before = failing = Failing(nth, errno.EIO)
        refused = False
        try:
            act(store)
        except StorageFailed:
            refused = True
        if failing.kind is None:
            break
        assert judged(tree, changes, len(changes) + 1, new, tmp_path / "after")["torn"] == 0
        if refused:  # the caller was told that the old version stands
            stands = judged(tree, changes, len(changes) + 1, new, tmp_path / "after", since=len(changes))
            assert stands.keys() == {"old"}


@dataclass
class Killed:
    """A `before` by which a process ends at its n-th change."""

    left: int

    def __call__(self, change: Change) -> None:
        self.left -= 1
        if self.left <= 0:
            raise KeyboardInterrupt


def renumbered(change: Change) -> Change:
    """Files of a second disk, told from those of the first."""
    return Change(change.what, change.place, change.file + 1000, change.data, change.target, change.size)


# Controls: what the judge must find.


class ForgetfulDisk(WatchedDisk):
    """Leaves out what a writer would leave out that does not sync."""

    forgets = ""

    def sync(self, file: int) -> None:
        if self.forgets != "sync":
            super().sync(file)

    def sync_folder(self, place: str) -> None:
        if self.forgets != "sync_folder":
            super().sync_folder(place)


@pytest.mark.parametrize("forgets", ["sync", "sync_folder"])
def test_control_a_writer_that_does_not_sync_is_caught(tmp_path: Path, forgets: str) -> None:
    tree = prepared(tmp_path / "before")
    changes: list[Change] = []
    disk = ForgetfulDisk(plant(tree, tmp_path / "run"), after=changes.append)
    disk.forgets = forgets
    publish(Store.open(disk.root, disk=disk), "vqa", 3)
    verdicts = judged(tree, changes, len(changes), OLD | {"vqa": (4, False, file_of(3))}, tmp_path / "after")
    assert verdicts["torn"] > 0
    assert forgets == "sync" or verdicts["lost"] > 0


def test_control_a_writer_in_place_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_over(self: Refs, head: Head, *, what: str, then: Callable[[], None]) -> None:
        disk = self._disk
        file = disk.open_log(self.head_place(head.name))
        disk.truncate(file, 0)
        disk.write(file, head.to_json().encode())
        disk.sync(file)
        disk.close(file)
        then()

    monkeypatch.setattr(Refs, "move_head", write_over)
    tree = prepared(tmp_path / "before")
    changes, acknowledged = recorded(tree, tmp_path / "run", lambda store: publish(store, "vqa", 3))
    verdicts = judged(tree, changes, acknowledged, OLD | {"vqa": (4, False, file_of(3))}, tmp_path / "after")
    assert verdicts["torn"] > 0


def test_control_a_reference_before_its_file_is_caught(tmp_path: Path) -> None:
    class Late(Upload):
        """Keeps the file only when HEAD stands for it already."""

        def keep(self, place: str) -> None:
            self.later = place

    def publish_backwards(store: Store) -> None:
        with Late(store._disk) as upload:
            upload.write(file_of(3))
            store.publish(
                "vqa", upload, prompt(3), author="x", on_head=lambda record: Upload.keep(upload, upload.later)
            )

    tree = prepared(tmp_path / "before")
    changes, acknowledged = recorded(tree, tmp_path / "run", publish_backwards)
    verdicts = judged(tree, changes, acknowledged, OLD | {"vqa": (4, False, file_of(3))}, tmp_path / "after")
    assert verdicts["torn"] > 0
