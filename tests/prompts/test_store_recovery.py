"""Recovery: whatever was damaged while nobody looked, every whole prompt is served and nothing refuses to start."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from promptmux_prompts import BlobCorrupt, Head, Store
from prompts.store_cases import contents, file_of, kept, prompt, publish, unfinished
from prompts.watched_disk import QuickDisk


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def opened(root: Path) -> Store:
    root.mkdir(exist_ok=True)
    return Store.open(root, disk=QuickDisk(root))


def blob(store: Store, name: str, version: int) -> Path:
    return store.blob_path(store.record(name, version))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_one_bad_blob_of_fifty_leaves_forty_nine(root: Path, damage: Callable[[Path], object]) -> None:
    store = opened(root)
    for number in range(50):
        publish(store, f"task-{number}", number)
    damage(blob(store, "task-7", 1))
    recovery = opened(root).recover()
    assert [(found.name, found.version, found.fallback) for found in recovery.damaged] == [("task-7", 1, None)]
    with pytest.raises(BlobCorrupt):
        store.read(store.record("task-7", 1))
    store.delete("task-7", author="x")
    assert contents(store) == {f"task-{number}": (1, file_of(number)) for number in range(50) if number != 7}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_bad_blob_falls_back_to_the_newest_whole_version_before_it(
    root: Path, damage: Callable[[Path], object]
) -> None:
    store = opened(root)
    for number in (1, 2, 3, 4, 5):
        publish(store, "vqa", number)
    store.rollback("vqa", author="x", to=4)
    damage(blob(store, "vqa", 4))
    damage(blob(store, "vqa", 3))
    (found,) = opened(root).recover().damaged
    assert (found.version, found.fallback) == (4, 2)  # not 5, from which somebody rolled back
    assert contents(store) == {"vqa": (2, file_of(2))}
    assert opened(root).recover().damaged == ()
    assert publish(store, "vqa", 6).version == 6


def test_without_fallback_a_bad_blob_quarantines_its_name(root: Path) -> None:
    store = opened(root)
    publish(store, "vqa", 1)
    publish(store, "vqa", 2)
    flip(blob(store, "vqa", 2))
    (found,) = store.recover(fall_back=False).damaged
    assert (found.version, found.fallback) == (2, None)
    with pytest.raises(BlobCorrupt):
        store.read(store.record("vqa", 2))
    assert publish(store, "vqa", 2).version == 3
    assert contents(store) == {"vqa": (3, file_of(2))}
    assert store.recover().damaged == ()


def test_a_bad_blob_is_kept_for_somebody_to_look_at(root: Path) -> None:
    store = opened(root)
    record = publish(store, "vqa", 1)
    store.blob_path(record).write_bytes(b"not what it was")
    store.recover()
    assert [path.read_bytes() for path in (root / "quarantine").iterdir()] == [b"not what it was"]
    assert not store.blob_path(record).exists()
    store.blob_path(record).write_bytes(file_of(1))  # restored by hand
    assert opened(root).recover().damaged == ()
    assert contents(store) == {"vqa": (1, file_of(1))}


GARBLED = {
    "empty": b"",
    "cut": b'{"deleted":fal',
    "noise": bytes(range(256)),
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "another schema": b'{"schema":2}',
    "a field too few": b'{"schema":1,"name":"vqa","version":2}',
    "wrong type": Head("vqa", True, 2, 1, deleted=False, pinned=False, seed=None).to_json().encode(),
    "another name's": Head("x", 2, 2, 1, deleted=False, pinned=False, seed=None).to_json().encode(),
    "huge": b" " * 10_000_000,
}


@pytest.mark.parametrize("garbage", GARBLED.values(), ids=GARBLED.keys())
def test_a_garbled_head_is_written_again_from_the_log(root: Path, garbage: bytes) -> None:
    store = opened(root)
    publish(store, "other", 9)
    for number in (1, 2, 3):
        publish(store, "vqa", number, seed=number == 1)
    store.rollback("vqa", author="x")
    store.set_pinned("vqa", True, author="x")
    before = store.head("vqa")
    (root / "refs" / "vqa" / "HEAD.json").write_bytes(garbage)
    assert sorted(contents(store)) == ["other"]
    (found,) = opened(root).recover().damaged
    assert (found.name, found.version, found.fallback) == ("vqa", None, 2)
    assert store.head("vqa") == before
    assert contents(store) == {"other": (1, file_of(9)), "vqa": (2, file_of(2))}


def test_a_head_that_vanished_is_written_again_from_the_log(root: Path) -> None:
    store = opened(root)
    publish(store, "vqa", 1)
    (root / "refs" / "vqa" / "HEAD.json").unlink()
    store.collect(older_than_s=0)  # which must not take the versions for unfinished ones
    (found,) = opened(root).recover().damaged
    assert (found.version, found.fallback) == (None, 1)
    assert contents(store) == {"vqa": (1, file_of(1))}


def test_a_garbled_tombstone_does_not_bring_a_name_back(root: Path) -> None:
    store = opened(root)
    publish(store, "vqa", 1)
    publish(store, "vqa", 2)
    store.delete("vqa", author="x")
    before = store.head("vqa")
    (root / "refs" / "vqa" / "HEAD.json").write_bytes(b"garbage")
    assert opened(root).recover().damaged == ()
    assert (contents(store), store.head("vqa")) == ({}, before)
    assert publish(store, "vqa", 3).version == 3


def test_a_garbled_head_without_a_log_stands_for_the_newest_version(root: Path) -> None:
    store = opened(root)
    for number in (1, 2):
        publish(store, "vqa", number)
    (root / "refs" / "vqa" / "HEAD.json").write_bytes(b"garbage")
    (root / "log" / "audit.jsonl").unlink()
    (found,) = opened(root).recover().damaged
    assert (found.version, found.fallback) == (None, 2)
    assert contents(store) == {"vqa": (2, file_of(2))}


@pytest.mark.parametrize("garbage", GARBLED.values(), ids=GARBLED.keys())
def test_a_garbled_record_falls_back(root: Path, garbage: bytes) -> None:
    store = opened(root)
    for number in (1, 2):
        publish(store, "vqa", number)
    (root / "refs" / "vqa" / "2.json").write_bytes(garbage)
    assert [record.version for record in store.versions("vqa")] == [1]
    (found,) = opened(root).recover().damaged
    assert (found.version, found.fallback) == (2, 1)
    assert contents(store) == {"vqa": (1, file_of(1))}
    assert publish(store, "vqa", 3).version == 3


def test_a_record_of_another_version_is_no_record(root: Path) -> None:
    store = opened(root)
    for number in (1, 2, 3):
        publish(store, "vqa", number)
    shutil.copy(root / "refs" / "vqa" / "1.json", root / "refs" / "vqa" / "3.json")
    with pytest.raises(BlobCorrupt):
        store.record("vqa", 3)
    (found,) = opened(root).recover().damaged
    assert (found.version, found.fallback) == (3, 2)


def test_a_missing_record_falls_back(root: Path) -> None:
    store = opened(root)
    for number in (1, 2):
        publish(store, "vqa", number)
    (root / "refs" / "vqa" / "2.json").unlink()
    (found,) = opened(root).recover().damaged
    assert (found.version, found.fallback) == (2, 1)


def test_a_folder_in_place_of_each_file_stops_nobody(root: Path) -> None:
    store = opened(root)
    for number, name in enumerate(("good", "head", "record", "blob")):
        publish(store, name, number)
    for path in (
        root / "refs" / "head" / "HEAD.json",
        root / "refs" / "record" / "1.json",
        blob(store, "blob", 1),
        root / "refs" / "stray.json",
        root / "refs" / "good" / "stray",
        root / "tmp" / "stray",
    ):
        path.unlink(missing_ok=True)
        path.mkdir()
    (root / "refs" / "stray").write_bytes(b"")
    assert sorted(found.name for found in opened(root).recover().damaged) == ["blob", "head", "record"]
    assert store.read(store.record("good", 1)) == file_of(0)
    publish(store, "new", 1)
    store.collect(older_than_s=0)
    assert store.read(store.record("new", 1)) == file_of(1)


def test_files_that_cannot_be_read_stop_nobody(root: Path) -> None:
    store = opened(root)
    for number, name in enumerate(("good", "head", "record", "blob")):
        publish(store, name, 9)
        publish(store, name, number)
    bad_blob = blob(store, "blob", 2)

    class Unreadable(QuickDisk):
        """Three bad sectors."""

        def open(self, place: str):  # type: ignore[no-untyped-def]
            if place in ("refs/head/HEAD.json", "refs/record/2.json", f"blobs/{bad_blob.name}"):
                raise OSError(errno.EIO, "bad sector")
            return super().open(place)

    failing = Store.open(root, disk=Unreadable(root))
    assert {found.name: found.fallback for found in failing.recover().damaged} == {"head": None, "record": 1, "blob": 1}
    assert contents(failing) == {"good": (2, file_of(0)), "record": (1, file_of(9)), "blob": (1, file_of(9))}
    assert bad_blob.exists()  # it may be whole
    assert failing.collect(older_than_s=0).blobs == 0  # which version needs what is not known
    assert contents(opened(root))["head"] == (2, file_of(1))


def test_what_dead_processes_left_is_cleared_and_what_is_being_written_stays(root: Path) -> None:
    store = opened(root)
    for name in ("a", "b"):
        (root / "tmp" / name).write_bytes(b"left")
    with store.upload() as upload:
        upload.write(file_of(1))
        os.utime(root / "tmp" / next(n for n in unfinished(root) if len(n) > 1), (0, 0))
        assert opened(root).recover().cleared == 2
        store.publish("vqa", upload, prompt(1), author="x")
    assert contents(store) == {"vqa": (1, file_of(1))}
    assert unfinished(root) == []


def test_a_file_younger_than_the_process_is_left_alone(root: Path) -> None:
    store = opened(root)
    (root / "tmp" / "young").write_bytes(b"left")
    os.utime(root / "tmp" / "young", (2**33, 2**33))
    assert store.recover().cleared == 0


def test_recovery_spares_a_version_that_was_published_meanwhile(root: Path) -> None:
    publish(opened(root), "vqa", 1)
    blob(opened(root), "vqa", 1).write_bytes(b"garbage")

    class Interrupted(QuickDisk):
        """Somebody mends the prompt when recovery has just seen that it is damaged."""

        waiting = True

        def lock(self, place: str, *, shared: bool = False):  # type: ignore[no-untyped-def]
            if self.waiting:
                self.waiting = False
                publish(opened(root), "vqa", 1)
            return super().lock(place, shared=shared)

    recovery = Store.open(root, disk=Interrupted(root)).recover()
    assert recovery.damaged == ()
    assert contents(opened(root)) == {"vqa": (2, file_of(1))}
    assert kept(opened(root), "vqa") == {1: file_of(1), 2: file_of(1)}


def test_a_copy_that_was_made_while_somebody_published_is_a_store(root: Path) -> None:
    store, copy = opened(root / "registry"), root / "copy"
    for number in (1, 2):
        publish(store, "vqa", number)
    publish(store, "gone", 3)
    copy.mkdir()
    for folder in ("refs", "log", "blobs"):
        shutil.copytree(root / "registry" / folder, copy / folder)
        publish(store, "vqa", 4)
        publish(store, "new", 4)
        if folder == "refs":
            store.delete("gone", author="x")
    restored = opened(copy)
    assert restored.recover().damaged == ()
    assert contents(restored) == {"vqa": (2, file_of(2)), "gone": (1, file_of(3))}
    assert publish(restored, "vqa", 5).version == 3
