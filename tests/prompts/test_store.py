"""The store by one caller: publish, roll back, delete, what is refused, what other users of the machine may do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from promptmux_prompts import (
    ABSENT,
    BlobCorrupt,
    InvalidName,
    NameNotFound,
    RegistryFull,
    Store,
    VersionMismatch,
    VersionNotFound,
)
from promptmux_prompts.records import Head, VersionRecord
from prompts.store_cases import blobs, contents, file_of, kept, prompt, publish, unfinished
from prompts.watched_disk import QuickDisk, WatchedDisk


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def store(root: Path) -> Store:
    root.mkdir()
    return Store.open(root, disk=QuickDisk(root))


def audit(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "log" / "audit.jsonl").read_bytes().splitlines()]


def test_what_is_published_is_read_back(store: Store) -> None:
    record = publish(store, "vqa", 1, author="trainer")
    assert record == store.record("vqa", 1)
    assert store.read(record) == file_of(1) == store.blob_path(record).read_bytes()
    assert (record.version, record.sha256, record.author) == (1, prompt(1).digest, "trainer")
    assert (record.bytes, record.file_sha256) == (len(file_of(1)), hashlib.sha256(file_of(1)).hexdigest())
    assert (record.encoder_length, record.decoder_length) == (1, 0)


def test_versions_increase_and_are_kept(store: Store) -> None:
    assert [publish(store, "vqa", number).version for number in (1, 2, 3)] == [1, 2, 3]
    assert kept(store, "vqa") == {1: file_of(1), 2: file_of(2), 3: file_of(3)}
    assert store.head("vqa") == Head("vqa", 3, 3, 1, deleted=False, pinned=False, seed=None)


def test_publishing_the_same_content_again_makes_no_version(store: Store, root: Path) -> None:
    first = publish(store, "vqa", 1)
    assert publish(store, "vqa", 1) == first
    assert [record.version for record in store.versions("vqa")] == [1]
    assert [line["action"] for line in audit(root)] == ["publish", "publish"]
    assert unfinished(root) == []


def test_publishing_the_same_content_again_mends_a_damaged_file(store: Store) -> None:
    first = publish(store, "vqa", 1)
    store.blob_path(first).write_bytes(file_of(2))
    with pytest.raises(BlobCorrupt):
        store.read(first)
    assert publish(store, "vqa", 1).version == 2
    assert kept(store, "vqa") == {1: file_of(1), 2: file_of(1)}


def test_rollback_goes_to_the_version_below(store: Store) -> None:
    for number in (1, 2, 3):
        publish(store, "vqa", number)
    assert store.rollback("vqa", author="x").version == 2
    assert store.rollback("vqa", author="x").version == 1
    assert store.rollback("vqa", author="x", to=3).version == 3
    assert contents(store) == {"vqa": (3, file_of(3))}
    store.rollback("vqa", author="x", to=1)
    assert publish(store, "vqa", 4).version == 4  # numbers go on from the highest, not from HEAD


def test_rollback_passes_over_a_damaged_version(store: Store) -> None:
    records = [publish(store, "vqa", number) for number in (1, 2, 3)]
    store.blob_path(records[1]).write_bytes(b"garbage")
    with pytest.raises(BlobCorrupt):
        store.rollback("vqa", author="x", to=2)
    assert store.rollback("vqa", author="x").version == 1


def test_rollback_without_a_version_to_go_to_changes_nothing(store: Store) -> None:
    publish(store, "vqa", 1)
    for to in (None, 2, 0, -1):
        with pytest.raises(VersionNotFound):
            store.rollback("vqa", author="x", to=to)
    assert contents(store) == {"vqa": (1, file_of(1))}


def test_a_deleted_name_is_gone_and_its_numbers_stay_used(store: Store) -> None:
    publish(store, "vqa", 1, seed=True)
    publish(store, "vqa", 2)
    store.set_pinned("vqa", True, author="x")
    store.delete("vqa", author="x")
    assert (contents(store), store.versions("vqa")) == ({}, [])
    assert store.head("vqa") == Head("vqa", 2, 2, 3, deleted=True, pinned=False, seed=prompt(1).digest)
    with pytest.raises(NameNotFound):
        store.record("vqa", 2)
    assert publish(store, "vqa", 1).version == 3
    assert kept(store, "vqa") == {3: file_of(1)}
    with pytest.raises(VersionNotFound):
        store.rollback("vqa", author="x")
    with pytest.raises(VersionNotFound):
        store.record("vqa", 2)


def test_a_pin_outlives_publications_and_the_last_seed_is_remembered(store: Store) -> None:
    publish(store, "vqa", 1, seed=True)
    assert store.set_pinned("vqa", True, author="x").pinned
    publish(store, "vqa", 2)
    head = store.head("vqa")
    assert head is not None
    assert (head.pinned, head.seed) == (True, prompt(1).digest)
    publish(store, "vqa", 2, seed=True)  # the same content, now taken up from a file
    head = store.head("vqa")
    assert head is not None
    assert (head.version, head.seed) == (2, prompt(2).digest)
    assert not store.set_pinned("vqa", False, author="x").pinned


@pytest.mark.parametrize(
    ("stands", "expected", "agrees"),
    [
        ("absent", None, True),
        ("absent", ABSENT, True),
        ("absent", 1, False),
        ("at 2", None, True),
        ("at 2", 2, True),
        ("at 2", 1, False),
        ("at 2", ABSENT, False),
        ("deleted", ABSENT, True),
        ("deleted", 2, False),
    ],
)
def test_a_change_happens_only_at_the_expected_version(
    store: Store, root: Path, stands: str, expected: Any, agrees: bool
) -> None:
    if stands != "absent":
        publish(store, "vqa", 1)
        publish(store, "vqa", 2)
    if stands == "deleted":
        store.delete("vqa", author="x")
    before = (contents(store), sorted(root.rglob("*.json")))
    if agrees:
        publish(store, "vqa", 3, expected=expected)
        assert contents(store)["vqa"][1] == file_of(3)
        return
    with pytest.raises(VersionMismatch):
        publish(store, "vqa", 3, expected=expected)
    with pytest.raises(VersionMismatch):
        store.rollback("vqa", author="x", expected=expected)
    with pytest.raises(VersionMismatch):
        store.delete("vqa", author="x", expected=expected)
    assert (contents(store), sorted(root.rglob("*.json"))) == before
    assert unfinished(root) == []


def test_the_caller_hears_of_a_new_version_once_it_is_durable(root: Path) -> None:
    heard: list[tuple[int, int]] = []
    changes: list[str] = []
    root.mkdir()
    store = Store.open(root, disk=WatchedDisk(root, after=lambda change: changes.append(change.what)))

    def hear(record: VersionRecord) -> None:
        heard.append((record.version, len(changes)))

    publish(store, "vqa", 1, on_head=hear)
    publish(store, "vqa", 2, on_head=hear)
    store.rollback("vqa", author="x", on_head=hear)
    assert [version for version, _ in heard] == [1, 2, 1]
    assert all(changes[count - 2 : count].count("sync") == 1 for _, count in heard)  # of the audit line
    store.delete("vqa", author="x", on_head=lambda: heard.append((0, 0)))
    assert heard[-1] == (0, 0)


def test_every_change_leaves_a_line(store: Store, root: Path) -> None:
    publish(store, "vqa", 1, author="anna")
    publish(store, "vqa", 2, author="bert\n{}")
    store.rollback("vqa", author="anna")
    store.set_pinned("vqa", True, author="anna")
    store.set_pinned("vqa", False, author="anna")
    store.delete("vqa", author="anna")
    lines = audit(root)
    assert [line["action"] for line in lines] == ["publish", "publish", "rollback", "pin", "unpin", "delete"]
    assert lines[1]["author"] == "bert\n{}"
    assert [line["head"]["version"] for line in lines] == [1, 2, 1, 1, 1, 1]
    assert lines[2]["sha256"] == prompt(1).digest


def test_a_torn_line_spoils_no_other(store: Store, root: Path) -> None:
    publish(store, "vqa", 1)
    with (root / "log" / "audit.jsonl").open("ab") as log:
        log.write(b'{"action":"pub')
    publish(store, "vqa", 2)
    lines = (root / "log" / "audit.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["head"]["version"] for line in (lines[0], lines[2])] == [1, 2]


def test_the_registry_is_full_at_its_limit_and_not_before(root: Path) -> None:
    root.mkdir()
    store = Store.open(root, max_names=2, disk=QuickDisk(root))
    publish(store, "a", 1)
    publish(store, "b", 1)
    with pytest.raises(RegistryFull):
        publish(store, "c", 1)
    publish(store, "a", 2)
    store.delete("b", author="x")
    publish(store, "c", 1)
    with pytest.raises(RegistryFull):
        publish(store, "b", 1)
    assert sorted(contents(store)) == ["a", "c"]


def test_an_upload_that_is_not_published_leaves_nothing(store: Store, root: Path) -> None:
    with store.upload() as upload:
        upload.write(b"abc")
        upload.write(b"def")
        assert (upload.read(), upload.size) == (b"abcdef", 6)
        assert upload.sha256 == hashlib.sha256(b"abcdef").hexdigest()
        (left,) = unfinished(root)
        (root / "tmp" / left).rename(root / "tmp" / "elsewhere")  # what was received is read, not what is found there
        assert upload.read() == b"abcdef"
        (root / "tmp" / "elsewhere").rename(root / "tmp" / left)
    assert unfinished(root) == []
    with pytest.raises(InvalidName):
        publish(store, "Not a name", 1)
    assert (unfinished(root), blobs(root)) == ([], set())


def test_an_upload_is_published_once(store: Store) -> None:
    with store.upload() as upload:
        upload.write(file_of(1))
        store.publish("a", upload, prompt(1), author="x")
        with pytest.raises(ValueError, match="once"):
            store.publish("b", upload, prompt(1), author="x")
    assert list(contents(store)) == ["a"]
