"""A-03 (d): the disk fails or is full at any of the changes that an operation makes. Then nothing has changed."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from promptmux_prompts import StorageFailed, StorageFull, Store, StoreError, VersionRecord
from prompts.store_cases import contents, file_of, kept, publish, unfinished
from prompts.watched_disk import Change, Failing, QuickDisk, WatchedDisk

OLD = {"vqa": (2, file_of(2)), "other": (1, file_of(9))}

OPERATIONS: dict[str, tuple[Callable[[Store], object], dict[str, tuple[int, bytes]]]] = {
    "publish a version": (lambda store: publish(store, "vqa", 4), OLD | {"vqa": (4, file_of(4))}),
    "publish a name": (lambda store: publish(store, "new", 4), OLD | {"new": (1, file_of(4))}),
    "publish what stands": (lambda store: publish(store, "vqa", 2), OLD),
    "publish a deleted name": (lambda store: publish(store, "dead", 4), OLD | {"dead": (2, file_of(4))}),
    "rollback": (lambda store: store.rollback("vqa", author="x"), OLD | {"vqa": (1, file_of(1))}),
    "delete": (lambda store: store.delete("vqa", author="x"), {"other": (1, file_of(9))}),
    "pin": (lambda store: store.set_pinned("vqa", True, author="x"), OLD),
    "collect": (lambda store: store.collect(older_than_s=0), OLD),
}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions of a name of which the second stands, another name, a deleted one, and files nobody needs."""
    root = tmp_path_factory.mktemp("before") / "registry"
    root.mkdir()
    store = Store.open(root, disk=QuickDisk(root))
    for number in (1, 2, 3):
        publish(store, "vqa", number)
    store.rollback("vqa", author="x")
    publish(store, "other", 9)
    publish(store, "dead", 7)
    store.delete("dead", author="x")
    return root


@pytest.fixture
def copies(before: Path, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Numbers from 1, each with a store of its own to damage."""
    return ((nth, shutil.copytree(before, tmp_path / str(nth))) for nth in itertools.count(1))


@dataclass
class Dead:
    """A `before` that lets every change fail from the n-th on."""

    left: int

    def __call__(self, change: Change) -> None:
        self.left -= 1
        if self.left <= 0:
            raise OSError(errno.EIO, "as the test wants it")


def opened(root: Path, failing: Failing) -> Store:
    disk = WatchedDisk(root)
    store = Store.open(root, disk=disk)
    disk.before = failing
    return store


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize(("error", "raised"), [(errno.EIO, StorageFailed), (errno.ENOSPC, StorageFull)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_failed_change_leaves_the_old_version_and_the_next_one_works(
    copies: Iterator[tuple[int, Path]], operation: str, error: int, raised: type[StoreError], lasting: bool
) -> None:
    act, new = OPERATIONS[operation]
    for nth, root in copies:
        failing = Failing(nth, error, lasting)
        store = opened(root, failing)
        refusal: StoreError | None = None
        try:
            act(store)
        except StoreError as error_raised:
            refusal = error_raised
        assert contents(store) == (OLD if refusal else new)
        assert failing.retried == []
        assert failing.kind == "unlink" or unfinished(root) == []
        failing.healed = True
        if refusal:
            assert type(refusal) is raised
            act(store)
        restarted = Store.open(root, disk=QuickDisk(root))
        assert restarted.recover().damaged == ()
        assert contents(restarted) == new
        assert all(kept(restarted, name) for name in new)
        if failing.kind is None:
            break
    assert nth > 5  # as many changes were failed one by one


def test_everything_fails_from_some_moment_on(copies: Iterator[tuple[int, Path]]) -> None:
    """Where not even the old HEAD can be put back, a whole one stands, old or new."""
    stood = set()
    for nth, root in copies:
        disk = WatchedDisk(root)
        store = Store.open(root, disk=disk)
        disk.before = Dead(nth)
        with suppress(StorageFailed):
            publish(store, "vqa", 4)
        restarted = Store.open(root, disk=QuickDisk(root))
        assert restarted.recover().damaged == ()
        stood.add(contents(restarted)["vqa"])
        if disk.before.left > 0:
            break
        assert publish(restarted, "vqa", 5).version in (4, 5)
    assert stood == {(2, file_of(2)), (4, file_of(4))}


def test_nobody_hears_of_a_version_that_failed(copies: Iterator[tuple[int, Path]]) -> None:
    for nth, root in copies:
        failing = Failing(nth, errno.EIO)
        heard: list[VersionRecord] = []
        try:
            publish(opened(root, failing), "vqa", 4, on_head=heard.append)
        except StorageFailed:
            assert heard == []
        else:
            assert [record.version for record in heard] == [4]
        if failing.kind is None:
            break


@pytest.mark.parametrize(
    ("error", "raised"), [(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EIO, StorageFailed)]
)
def test_an_upload_that_cannot_be_written_says_so(
    copies: Iterator[tuple[int, Path]], error: int, raised: type[StoreError]
) -> None:
    for nth, root in itertools.islice(copies, 2):
        with pytest.raises(raised), opened(root, Failing(nth, error)).upload() as upload:
            upload.write(b"x")
        assert unfinished(root) == []


def test_a_write_that_the_disk_takes_in_part_is_finished(
    copies: Iterator[tuple[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    _, root = next(copies)
    monkeypatch.setattr("promptmux_prompts.disk.os.write", lambda file, data: write(file, data[:7]))
    store = Store.open(root)
    publish(store, "vqa", 4)
    assert contents(store)["vqa"] == (4, file_of(4))


def test_a_sync_that_is_tried_again_is_noticed(copies: Iterator[tuple[int, Path]]) -> None:
    """Control of the watch on repeated syncs."""

    class Stubborn(WatchedDisk):
        def sync(self, file: int) -> None:
            try:
                super().sync(file)
            except OSError:
                super().sync(file)

    _, root = next(copies)
    disk = Stubborn(root)
    store = Store.open(root, disk=disk)
    disk.before = failing = Failing(3, errno.EIO)
    publish(store, "vqa", 4)
    assert (failing.kind, len(failing.retried)) == ("sync", 1)
