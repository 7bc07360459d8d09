"""Lines by number: any file, any order, no memory, and no index that outlives its file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmux_server.errors import DataError
from promptmux_server.training.data import lines as lines_module
from promptmux_server.training.data.lines import LineFile


def all_lines(path: Path) -> list[bytes]:
    file = LineFile(path, path.parent / "cache")
    return [file[number] for number in range(len(file))]


@given(
    content=st.lists(st.sampled_from([b"", b"a", b"bc\xff", b"\r", b"d" * 50]), min_size=1, max_size=30),
    end=st.booleans(),
)
def test_every_line_is_found_whatever_the_chunks_of_the_index(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes], end: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "file"
    path.write_bytes(b"\n".join(content) + (b"\n" if end else b""))
    written = path.read_bytes()
    expected = written.split(b"\n")[: -1 if written.endswith(b"\n") else None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_module, "CHUNK_BYTES", 7)
        if not written:
            with pytest.raises(DataError, match="empty"):
                LineFile(path, path.parent / "cache")
            return
        assert all_lines(path) == [line.rstrip(b"\r") for line in expected]


def test_the_index_is_made_once_and_again_when_the_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = tmp_path / "file", []
    original = lines_module._starts
    monkeypatch.setattr(lines_module, "_starts", lambda *given: made.append(1) or original(*given))
    path.write_bytes(b"a\nb\n")
    assert all_lines(path) == all_lines(path) == [b"a", b"b"]
    assert len(made) == 1
    path.write_bytes(b"a\nb\nc\n")
    assert all_lines(path) == [b"a", b"b", b"c"]
    assert len(made) == 2


@pytest.mark.parametrize("position", [3, 200, 520, -1], ids=["header", "digest-or-blank", "body", "cut"])
def test_a_damaged_index_is_made_again(tmp_path: Path, position: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a\nbb\nccc\n")
    expected = all_lines(path)
    (index,) = (tmp_path / "cache").iterdir()
    damaged = bytearray(index.read_bytes())
    if position < 0:
        del damaged[-4:]
    else:
        damaged[position] ^= 1
    index.write_bytes(damaged)
    assert all_lines(path) == expected


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a\nb\n")
    file = LineFile(path, tmp_path / "cache")
    assert file[1] == b"b"
    os.utime(path, ns=(0, 0))
    with pytest.raises(DataError, match="changed while it was read"):
        file[1]


def test_what_is_no_file_of_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl cannot be read"):
        LineFile(tmp_path / "nowhere.jsonl", tmp_path / "cache")
    (tmp_path / "blob").write_bytes(b"x" * 100)
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 99)
    with pytest.raises(DataError, match="blob, line 1: longer than"):
        LineFile(tmp_path / "blob", tmp_path / "cache")[0]


def test_an_index_that_the_disk_does_not_take_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a\n")
    (tmp_path / "cache").write_bytes(b"no folder")
    with pytest.raises(DataError, match="make room on the disk"):
        LineFile(tmp_path / "file", tmp_path / "cache")


MEASURE = """
import random, sys
from pathlib import Path
from promptmux_server.training.data.lines import LineFile
def peak_kib():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
path, count, way = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
small = path.with_name("small")
small.write_bytes(b"a" + chr(10).encode())
LineFile(small, path.parent / "cache")[0]
before = peak_kib()
if way == "index":
    file = LineFile(path, path.parent / "cache")
    assert len(file) == count
    rng = random.Random(1)
    for _ in range(2000):
        number = rng.randrange(count)
        assert file[number] == b"%07d" % number
else:
    kept = path.read_bytes().split(b"\\n")
print((peak_kib() - before) / 1024)
"""


def growth_mib(path: Path, count: int, way: str) -> float:
    """How much further the peak memory of a process goes, once it has read a small file."""
    command = [sys.executable, "-c", MEASURE, str(path), str(count), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return float(done.stdout)


def numbered_lines(path: Path, count: int) -> Path:
    path.write_bytes(b"".join(b"%07d\n" % number for number in range(count)))
    return path


def test_a_large_file_takes_a_few_mebibytes(tmp_path: Path) -> None:
    path = numbered_lines(tmp_path / "large", 200_000)
    assert growth_mib(path, 200_000, "index") < 6.0
    assert growth_mib(path, 200_000, "list") > 8.0  # the control: what holding all lines takes


@pytest.mark.soak
def test_a_million_lines_take_a_few_mebibytes(tmp_path: Path) -> None:
    path = numbered_lines(tmp_path / "large", 1_000_000)
    assert growth_mib(path, 1_000_000, "index") < 12.0  # 8 of them are the index, which the system may drop
    assert growth_mib(path, 1_000_000, "list") > 40.0
