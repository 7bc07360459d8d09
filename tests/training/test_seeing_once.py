"""Pictures pass the frozen stem once, and what comes from the cache is what the stem would have said."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from promptmux_server.backbone.image_key import ImageKey
from promptmux_server.backbone.images import DecodedImage, from_array
from promptmux_server.training.data.pictures import FilePicture, InlinePicture, UnreadablePicture
from promptmux_server.training.feature_cache import FeatureCache
from promptmux_server.training.seeing import Preparation, Stem
from training.data.data_files import HEIGHT, WIDTH, picture, pictures, standard

HOW = Preparation(64, 0.5, 0.5)


def stem(cache: FeatureCache | None, how: Preparation = HOW, **options: object) -> Stem:
    return Stem(tiny.model(), tiny.backbone().fingerprint, how, cache, **options)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> list[FilePicture]:
    pictures(tmp_path / "pictures", 6)
    return [FilePicture(tmp_path / "pictures" / f"{number}.png", f"{number}.png") for number in range(6)]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures in each pass of the stem."""
    seen: list[int] = []
    original = tiny.model().image_tokens
    monkeypatch.setattr(
        tiny.model(), "image_tokens", lambda pixels: seen.append(len(pixels)) or original(pixels), raising=False
    )
    return seen


def test_two_trials_and_all_their_epochs_see_a_picture_once(
    tmp_path: Path, folder: list[FilePicture], passes: list[int]
) -> None:
    cache = FeatureCache(tmp_path / "cache")
    for trial in (stem(cache), stem(cache)):
        for epoch in range(2):
            for number, one in enumerate(folder):
                trial.see(one, epoch * 6 + number)
    assert passes == [1] * 6
    for one in folder:
        stem(None).see(one, 0)
    assert len(passes) == 12  # the control: without a cache, again


def test_what_is_found_is_bit_for_bit_what_the_stem_says(tmp_path: Path, folder: list[FilePicture]) -> None:
    direct = [stem(None).see(one, 0) for one in folder]
    with FeatureCache(tmp_path / "cache") as cache:
        fresh = [stem(cache).see(one, 0) for one in folder]
    kept = [stem(FeatureCache(tmp_path / "cache")).see(one, 0) for one in reversed(folder)][::-1]
    for a, b, c in zip(direct, fresh, kept, strict=True):
        assert torch.equal(a.image.tokens, b.image.tokens)
        assert torch.equal(a.image.tokens, c.image.tokens)
        assert a.image.grid == b.image.grid == c.image.grid == (4, 4)
        assert (c.width, c.height) == (WIDTH, HEIGHT)


def test_a_known_file_is_not_even_decoded(
    tmp_path: Path, folder: list[FilePicture], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(tmp_path / "cache")
    expected = stem(cache).see(folder[0], 0)
    monkeypatch.setattr("promptmux_server.training.seeing.decoded", lambda *_given: pytest.fail("decoded again"))
    assert torch.equal(stem(cache).see(folder[0], 1).image.tokens, expected.image.tokens)
    assert torch.equal(stem(cache).see(InlinePicture(standard(picture(0))), 1).image.tokens, expected.image.tokens)


def test_other_files_of_the_same_pixels_share_one_pass(
    tmp_path: Path, folder: list[FilePicture], passes: list[int]
) -> None:
    cache = FeatureCache(tmp_path / "cache")
    stem(cache).see(folder[0], 0)
    buffer = io.BytesIO()
    Image.open(folder[0].path).save(buffer, "PNG", compress_level=0)
    assert buffer.getvalue() != folder[0].path.read_bytes()
    stem(cache).see(InlinePicture(standard(buffer.getvalue())), 0)
    assert passes == [1]


OTHERS = [replace(HOW, size=32), replace(HOW, mean=0.4), replace(HOW, std=0.25)]


@pytest.mark.parametrize("other", OTHERS, ids=["size", "mean", "std"])
def test_another_preparation_is_another_entry(tmp_path: Path, folder: list[FilePicture], other: Preparation) -> None:
    cache = FeatureCache(tmp_path / "cache")
    stem(cache).see(folder[0], 0)
    found = stem(cache, other).see(folder[0], 0)
    assert torch.equal(found.image.tokens, stem(None, other).see(folder[0], 0).image.tokens)


@pytest.mark.parametrize("other", OTHERS, ids=["size", "mean", "std"])
def test_a_key_without_the_preparation_would_serve_wrong_features(
    tmp_path: Path, folder: list[FilePicture], other: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    monkeypatch.setattr(Preparation, "key", lambda _self, digest: ImageKey(digest, 0, 0.0, 0.0))
    cache = FeatureCache(tmp_path / "cache")
    stem(cache).see(folder[0], 0)
    found = stem(cache, other).see(folder[0], 0)
    assert not torch.equal(found.image.tokens, stem(None, other).see(folder[0], 0).image.tokens)


def test_another_backbone_or_type_of_numbers_is_another_entry(
    tmp_path: Path, folder: list[FilePicture], passes: list[int]
) -> None:
    cache = FeatureCache(tmp_path / "cache")
    stem(cache).see(folder[0], 0)
    Stem(tiny.model(), "another fingerprint", HOW, cache).see(folder[0], 0)
    assert passes == [1, 1]
    key = HOW.key("digest")
    keys = {key.of_model("f", "torch.float32"), key.of_model("f", "torch.bfloat16"), key.of_model("g", "torch.float32")}
    assert len(keys) == 3


def brightened(image: DecodedImage, number: int) -> DecodedImage:
    return from_array(np.clip(image.rgb.astype(np.int64) + number, 0, 255).astype(np.uint8))


def test_where_pictures_change_the_cache_is_neither_asked_nor_filled(
    tmp_path: Path, folder: list[FilePicture], passes: list[int]
) -> None:
    cache = FeatureCache(tmp_path / "cache")
    changing = stem(cache, change=brightened)
    first, second, again = (changing.see(folder[0], number).image.tokens for number in (10, 20, 10))
    assert len(passes) == 3
    assert not torch.equal(first, second)
    assert torch.equal(first, again)  # the sample's number decides, so a resumed run sees the same
    assert (cache.stats().keys, cache.stats().misses) == (0, 0)


def test_a_picture_that_cannot_be_decoded_is_named_as_one(tmp_path: Path) -> None:
    with pytest.raises(UnreadablePicture, match="cannot be decoded"):
        stem(FeatureCache(tmp_path)).see(InlinePicture(standard(b"nothing")), 0)
