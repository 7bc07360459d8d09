"""Names and planted links lead nowhere outside the store, and another user of the group can share it."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from promptmux_prompts import ABSENT, BlobCorrupt, InvalidName, NameNotFound, StorageFailed, Store, StoreError
from prompts.store_cases import contents, file_of, publish
from prompts.watched_disk import QuickDisk

HOSTILE = [
    "",
    " ",
    ".",
    "..",
    "../vqa",
    "..%2fvqa",
    "a/../../b",
    "/etc/passwd",
    "//proc/self/root",
    "file:///etc/passwd",
    "a\0b",
    "a\r\nX: y",
    "a..b",
    "UPPER",
    "CON ",
    "\u2024\u2024",
    "\u202evqa",
    "v\u0301qa",
    "\uff0e\uff0e",
    "\u0661",
    "a" * 65,
    "a" * 4096,
    "-a",
    "_a",
    ".hidden",
    "vqa\n",
    "vqa/HEAD",
    "\ud800",
]


def tree(folder: Path) -> str:
    """A digest of everything below a folder: names, kinds, modes, contents."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else b""
        sha.update(f"{path.relative_to(folder)} {mode} {len(content)}\n".encode() + content)
    return sha.hexdigest()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "HEAD.json").write_text("{}")
    root = tmp_path / "registry"
    root.mkdir()
    return root


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_is_refused_and_touches_nothing(root: Path, name: str) -> None:
    store = Store.open(root, disk=QuickDisk(root))
    publish(store, "vqa", 1)
    before = tree(root.parent)
    with pytest.raises(InvalidName):
        publish(store, name, 2)
    for change in (store.rollback, store.delete):
        with pytest.raises(NameNotFound):
            change(name, author="x")
    with pytest.raises(NameNotFound):
        store.set_pinned(name, True, author="x")
    with pytest.raises(NameNotFound):
        store.record(name, 1)
    assert (store.head(name), store.versions(name)) == (None, [])
    # A refused upload was written into tmp/ and removed again; nothing else may have happened.
    assert tree(root.parent) == before


def test_the_refusal_does_not_repeat_the_name(root: Path) -> None:
    with pytest.raises(InvalidName) as refused:
        publish(Store.open(root), "a\nplanted", 1)
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize("folder", ["blobs", "refs", "log", "tmp", "quarantine", "refs/vqa"])
def test_a_folder_that_is_a_link_is_not_followed(root: Path, folder: str) -> None:
    store = Store.open(root)
    publish(store, "vqa", 1)
    publish(store, "other", 1)
    (root / folder).rename(root / "moved")
    (root / folder).symlink_to(root.parent / "outside")
    before = tree(root.parent / "outside")
    attempts = [
        lambda: publish(store, "vqa", 2),
        lambda: store.rollback("vqa", author="x"),
        lambda: store.delete("vqa", author="x"),
        lambda: store.collect(older_than_s=0),
        lambda: store.recover(),
        lambda: Store.open(root).recover(),
        lambda: list(store.heads()),
        lambda: store.read(store.record("vqa", 1)),
    ]
    refused = 0
    for attempt in attempts:
        try:
            attempt()
        except StoreError:
            refused += 1
    assert refused > 0
    assert tree(root.parent / "outside") == before


@pytest.mark.parametrize(
    "file", ["refs/vqa/HEAD.json", "refs/vqa/2.json", "refs/vqa/1.json", "log/audit.jsonl", "lock"]
)
def test_a_file_that_is_a_link_is_not_followed(root: Path, file: str) -> None:
    store = Store.open(root)
    publish(store, "vqa", 1)
    target = root.parent / "outside" / "target"
    target.write_bytes(b"precious")
    (root / file).unlink(missing_ok=True)
    (root / file).symlink_to(target)
    before = tree(root.parent / "outside")
    try:
        publish(store, "vqa", 2)
        published = True
    except StoreError:
        published = False
    if file != "lock":
        store.recover()
    assert tree(root.parent / "outside") == before
    # A version's record is renamed into place, and so replaces a link; all else is opened first.
    assert published == (file in ("refs/vqa/2.json", "refs/vqa/1.json"))


def test_a_blob_that_is_a_link_is_replaced_and_not_followed(root: Path) -> None:
    store = Store.open(root)
    record = publish(store, "vqa", 1)
    target = root.parent / "outside" / "target"
    target.write_bytes(file_of(1))
    store.blob_path(record).unlink()
    store.blob_path(record).symlink_to(target)
    with pytest.raises(BlobCorrupt):
        store.read(record)
    publish(store, "vqa", 1)
    assert contents(store) == {"vqa": (2, file_of(1))}
    assert not store.blob_path(record).is_symlink()
    assert target.read_bytes() == file_of(1)


def test_links_and_pipes_in_tmp_keep_nobody(root: Path) -> None:
    store = Store.open(root)
    (root / "tmp" / "link").symlink_to(root.parent / "outside" / "HEAD.json")
    (root / "tmp" / "folder").symlink_to(root.parent / "outside")
    os.mkfifo(root / "tmp" / "pipe")
    before = tree(root.parent / "outside")
    store.recover()
    store.collect(older_than_s=0)
    publish(store, "vqa", 1)
    assert contents(store) == {"vqa": (1, file_of(1))}
    assert tree(root.parent / "outside") == before


def test_a_root_that_is_a_link_is_the_operators_wish(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    publish(Store.open(link), "vqa", 1)
    assert contents(Store.open(root)) == {"vqa": (1, file_of(1))}


def test_a_root_that_cannot_be_made_is_a_failure_of_storage(root: Path) -> None:
    (root / "file").write_bytes(b"")
    with pytest.raises(StorageFailed):
        Store.open(root / "file" / "registry")


def test_files_and_folders_are_the_groups_whatever_the_umask(root: Path) -> None:
    before = os.umask(0o077)
    try:
        store = Store.open(root / "inner")
        publish(store, "vqa", 1)
        publish(store, "vqa", 2)
        publish(store, "other", 1, expected=ABSENT)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in (root / "inner").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o664}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o2775}


SECOND_USER = """
import os, sys
from pathlib import Path
from promptmux_prompts import Store
from prompts.store_cases import contents, file_of, publish
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[3]))
os.umask(0o077)
store = Store.open(Path(sys.argv[1]))
assert not store.recover().damaged
assert contents(store) == {"first": (1, file_of(1)), "both": (1, file_of(1))}
publish(store, "second", 2)
publish(store, "both", 2)
store.rollback("both", author="x")
store.delete("first", author="x")
store.collect(older_than_s=0)
print("done", os.getuid())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_two_users_of_one_group_share_a_store() -> None:
    group = 4711
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        root = Path(folder)
        os.chown(root, 0, group)
        root.chmod(0o2770)
        store = Store.open(root)
        publish(store, "first", 1)
        publish(store, "both", 1)
        second = subprocess.run(
            [sys.executable, "-c", SECOND_USER, folder, str(group), "4712"],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert second.stdout == "done 4712\n", second.stderr
        assert contents(store) == {"second": (1, file_of(2)), "both": (1, file_of(1))}
        assert publish(store, "both", 3).version == 3
        assert store.recover().damaged == ()
