"""What the stem has seen is kept once for everybody: whole, or not at all, and never at the price of the training."""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.training import feature_cache as cache_module
from promptmux_server.training.feature_cache import FeatureCache, FeatureCacheLimits
from promptmux_server.training.feature_segment import FOOTER, SeenPicture, Segment, write_segment

EAGER = FeatureCacheLimits(segment_bytes=1, reserve_bytes=0)
"""A segment for every picture."""


def seen(number: int, dtype: torch.dtype = torch.float32) -> SeenPicture:
    generator = torch.Generator().manual_seed(number)
    return SeenPicture(ImageTokens(torch.randn(6, 8, generator=generator).to(dtype), (2, 3)), 40 + number, 30)


def assert_same(found: SeenPicture | None, expected: SeenPicture) -> None:
    assert found is not None
    assert torch.equal(found.image.tokens, expected.image.tokens)
    assert found.image.tokens.dtype == expected.image.tokens.dtype
    assert (found.image.grid, found.width, found.height) == (expected.image.grid, expected.width, expected.height)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.features"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_is_found_bit_for_bit_before_and_after_it_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    with FeatureCache(tmp_path) as cache:
        for number in range(5):
            cache.keep((f"file {number}", f"pixels {number}"), seen(number, dtype))
        for number in range(5):
            assert_same(cache.find(f"file {number}"), seen(number, dtype))
        assert segments(tmp_path) == []
    assert len(segments(tmp_path)) == 1
    later = FeatureCache(tmp_path)
    for number in range(5):
        assert_same(later.find(f"pixels {number}"), seen(number, dtype))
    assert later.find("pixels 5") is None
    assert (later.stats().hits, later.stats().misses, later.stats().keys) == (5, 1, 10)


def test_a_picture_of_several_keys_is_written_once(tmp_path: Path) -> None:
    picture = seen(1)
    one = write_segment(tmp_path, {"a": picture}).stat().st_size
    several = write_segment(tmp_path, {"a": picture, "b": picture, "c": picture}).stat().st_size
    assert several - one < picture.nbytes


def test_tokens_of_the_cache_take_part_in_gradients_like_any_others(tmp_path: Path) -> None:
    with FeatureCache(tmp_path) as cache:
        cache.keep(("a",), seen(1))
    found = FeatureCache(tmp_path).find("a")
    assert found is not None
    weight = torch.ones(8, requires_grad=True)
    (found.image.tokens @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, seen(1).image.tokens.sum(0))


def test_a_process_finds_what_another_has_written_since(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, EAGER)
    assert cache.find("other") is None
    write = (
        "import sys, torch; from pathlib import Path\n"
        "from promptmux_server.backbone.encoder import ImageTokens\n"
        "from promptmux_server.training.feature_cache import FeatureCache\n"
        "from promptmux_server.training.feature_segment import SeenPicture\n"
        "with FeatureCache(Path(sys.argv[1])) as cache:\n"
        "    cache.keep(('other',), SeenPicture(ImageTokens(torch.full((6, 8), 2.5), (2, 3)), 4, 5))\n"
    )
    subprocess.run([sys.executable, "-c", write, str(tmp_path)], check=True, timeout=120)
    found = cache.find("other")
    assert found is not None
    assert torch.equal(found.image.tokens, torch.full((6, 8), 2.5))


def damages(path: Path) -> dict[str, bytes]:
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[10] ^= 1  # within the first record
    index = bytearray(whole)
    index[-FOOTER.size - 5] ^= 1
    return {
        "record": bytes(flipped),
        "index": bytes(index),
        "cut": whole[:-1],
        "empty": b"",
        "zeros": bytes(len(whole)),
    }


@pytest.mark.parametrize("damage", ["record", "index", "cut", "empty", "zeros"])
def test_a_damaged_file_is_removed_and_its_pictures_can_be_kept_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FeatureCache(tmp_path) as cache:
        for number in range(3):
            cache.keep((f"{number}",), seen(number))
    (path,) = segments(tmp_path)
    path.write_bytes(damages(path)[damage])
    with caplog.at_level(logging.WARNING), FeatureCache(tmp_path) as later:
        assert later.find("0") is None
        assert "damaged" in caplog.text
        assert segments(tmp_path) == []
        later.keep(("0",), seen(0))
    assert_same(FeatureCache(tmp_path).find("0"), seen(0))


def test_without_its_checksum_a_damaged_record_would_be_served(tmp_path: Path) -> None:
    """The control of the test above."""
    path = write_segment(tmp_path, {"0": seen(0)})
    path.write_bytes(damages(path)["record"])
    segment = Segment(path)
    segment._checked.add(0)
    assert not torch.equal(segment.read("0").image.tokens, seen(0).image.tokens)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_ends_the_keeping_and_not_the_training(
    tmp_path: Path, fault: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FeatureCache(tmp_path, EAGER)
    cache.keep(("0",), seen(0))

    def refuse(folder: Path, pictures: object) -> Path:
        (folder / "broken.part").write_bytes(b"half")
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(cache_module, "write_segment", refuse)
    with caplog.at_level(logging.WARNING):
        cache.keep(("1",), seen(1))
    assert "no longer kept" in caplog.text
    assert os.strerror(fault) in caplog.text
    assert not cache.keeps
    cache.keep(("2",), seen(2))
    cache.flush()
    assert caplog.text.count("no longer kept") == 1
    assert_same(cache.find("0"), seen(0))
    assert_same(cache.find("1"), seen(1))
    assert cache.find("2") is None


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What the kernel does to a write on a full disk, by the process's limit on the size of files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_breaks_off_leaves_nothing_and_the_rest_is_still_found(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, EAGER)
    cache.keep(("0",), seen(0))
    (whole,) = segments(tmp_path)
    with files_of_at_most(whole.stat().st_size // 2):
        cache.keep(("1",), seen(1))
    assert list(tmp_path.iterdir()) == [whole]
    assert not cache.keeps
    assert_same(FeatureCache(tmp_path).find("0"), seen(0))


def test_a_folder_that_cannot_be_made_is_a_cache_that_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = FeatureCache(tmp_path / "file" / "folder")
    assert not cache.keeps
    assert cache.find("0") is None


def test_the_budget_holds_and_what_nobody_reads_leaves_first(tmp_path: Path) -> None:
    with FeatureCache(tmp_path, EAGER) as cache:
        for number in range(3):
            cache.keep((f"{number}",), seen(number))
    paths = segments(tmp_path)
    size = paths[0].stat().st_size
    for age, path in enumerate(sorted(paths, key=lambda p: next(iter(Segment(p).keys)))):
        os.utime(path, (time.time() - 100 + age, time.time() - 100 + age))  # the first is the oldest
    later = FeatureCache(tmp_path, FeatureCacheLimits(max_bytes=int(3.5 * size), reserve_bytes=0, segment_bytes=1))
    assert_same(later.find("0"), seen(0))
    later.keep(("3",), seen(3))
    assert [later.find(f"{number}") is not None for number in range(4)] == [True, False, True, True]
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= 3.5 * size


def test_a_run_never_throws_out_what_it_reads_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every epoch reads all pictures in turn: making room for the last would lose the first, again and again."""
    size = write_segment(tmp_path, {"0": seen(0)}).stat().st_size
    cache = FeatureCache(tmp_path, FeatureCacheLimits(max_bytes=int(1.5 * size), reserve_bytes=0, segment_bytes=1))
    assert_same(cache.find("0"), seen(0))
    with caplog.at_level(logging.WARNING):
        cache.keep(("1",), seen(1))
    assert not cache.keeps
    assert "no room left within its limits" in caplog.text
    assert_same(cache.find("0"), seen(0))


def test_room_for_checkpoints_is_left_on_the_disk(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, FeatureCacheLimits(reserve_bytes=1 << 60, segment_bytes=1))
    cache.keep(("0",), seen(0))
    assert not cache.keeps
    assert segments(tmp_path) == []


def test_files_whose_writer_died_are_removed_and_those_under_way_are_not(tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("new", 1)):
        (tmp_path / f"{name}.part").write_bytes(b"half")
        os.utime(tmp_path / f"{name}.part", (time.time() - age, time.time() - age))
    FeatureCache(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new.part"]
