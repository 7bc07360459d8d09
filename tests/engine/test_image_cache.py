"""The image cache: exact in bytes whatever happens, one stem pass a picture, and never stale."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.image_key import ImageKey
from promptmux_server.backbone.images import from_array
from promptmux_server.engine.image_cache import ImageCache
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.request import Answer, Request

BUDGET = 1000


def key(number: int) -> ImageKey:
    return ImageKey(str(number), 64, 0.5, 0.5)


def image(floats: int) -> ImageTokens:
    return ImageTokens(torch.full((floats, 1), float(floats)), (floats, 1))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8), st.integers(1, 300)), max_size=60))
def test_bytes_are_those_of_what_is_kept_and_never_over_the_budget(calls: list[tuple[bool, int, int]]) -> None:
    cache, asked = ImageCache(BUDGET), 0
    for put, number, floats in calls:
        if put:
            cache.put(key(number), image(floats))
        else:
            asked += 1
            found = cache.get(key(number))
            assert found is None or found.tokens.unique().item() == found.grid[0]
        stats = cache.stats()
        kept = [found for n in range(9) if (found := cache._entries.get(key(n)))]
        assert stats.bytes == sum(entry.tokens.untyped_storage().nbytes() for entry in kept) <= BUDGET
        assert stats.pictures == len(kept)
        assert stats.hits + stats.misses == asked


def test_the_least_recently_used_picture_leaves_first() -> None:
    cache = ImageCache(BUDGET)
    for number in range(2):
        cache.put(key(number), image(100))
    assert cache.get(key(0)) is not None
    cache.put(key(2), image(100))
    assert [cache.get(key(number)) is not None for number in range(3)] == [True, False, True]


def test_what_is_kept_does_not_keep_its_stem_pass() -> None:
    cache, batch = ImageCache(BUDGET), torch.zeros(50, 4, 5)
    cache.put(key(0), ImageTokens(batch[3], (2, 2)))
    found = cache.get(key(0))
    assert found is not None
    assert found.tokens.untyped_storage().nbytes() == 4 * 5 * 4


@pytest.mark.parametrize(
    "other",
    [
        ImageKey("1", 64, 0.5, 0.5),
        ImageKey("0", 32, 0.5, 0.5),
        ImageKey("0", 64, 0.4, 0.5),
        ImageKey("0", 64, 0.5, 0.4),
    ],
)
def test_another_picture_or_another_preparation_is_another_entry(other: ImageKey) -> None:
    cache = ImageCache(BUDGET)
    cache.put(key(0), image(10))
    assert cache.get(other) is None


class Served:
    """An engine on a prompt directory, asked about one picture."""

    def __init__(self, folder: Path, cache_bytes: int) -> None:
        self.engine = tiny.engine(folder, EngineOptions(image_cache_bytes=cache_bytes))
        self.engine.start()
        rgb = np.random.default_rng(5).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        self.picture = from_array(rgb)

    def ask(self, task: str = "a") -> Answer:
        request = Request(request_id="r", task=task, text="the dog", image=self.picture, deadline=time.monotonic() + 30)
        answer = self.engine.submit(request).result(30)
        deadline = time.monotonic() + 10
        while self.engine._pictures._current:  # a request that has not quite ended would share its picture
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return answer


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures in each pass of the stem."""
    seen: list[int] = []
    original = tiny.model().image_tokens
    monkeypatch.setattr(
        tiny.model(), "image_tokens", lambda pixels: seen.append(len(pixels)) or original(pixels), raising=False
    )
    return seen


@pytest.mark.parametrize(("cache_bytes", "expected"), [(1 << 20, [1]), (0, [1, 1, 1])], ids=["kept", "not-kept"])
def test_a_picture_passes_the_stem_once_for_all_tasks(
    tmp_path: Path, passes: list[int], cache_bytes: int, expected: list[int]
) -> None:
    tiny.write(tmp_path, tiny.prompt("a"), tiny.prompt("b", seed=2))
    served = Served(tmp_path, cache_bytes)
    for task in ("a", "b", "a"):
        served.ask(task)
    assert passes == expected
    stats = served.engine.load().images
    assert (stats.hits, stats.misses) == (3 - len(expected), len(expected))
    served.engine.stop(2.0)


def test_replacing_a_prompt_leaves_nothing_stale(tmp_path: Path, passes: list[int]) -> None:
    """The picture comes from the cache, the answer from the new prompt: both as without a cache."""
    tiny.write(tmp_path, tiny.prompt("a"))
    kept = Served(tmp_path, 1 << 20)
    before = kept.ask()
    tiny.write(tmp_path, tiny.prompt("a", seed=9))
    kept.engine.reload()
    after, count = kept.ask(), len(passes)
    anew = Served(tmp_path, 0)
    expected = anew.ask()
    assert count == 1
    assert after.prompt.sha256 == expected.prompt.sha256 != before.prompt.sha256
    assert after.output == expected.output
    assert after.score == pytest.approx(expected.score, abs=1e-6)
    assert after.score != pytest.approx(before.score, abs=1e-6)
    for served in (kept, anew):
        served.engine.stop(2.0)
