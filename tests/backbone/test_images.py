"""Pictures: every mode that the formats have, and nothing that costs more than the limits allow."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from promptmux_server.backbone.images import ImageLimits, decode_base64_image, decode_image, image_size, preprocess
from promptmux_server.errors import ImageTooLarge, MalformedImage, PromptmuxError

LIMITS = ImageLimits()


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def noise(width: int = 20, height: int = 10) -> Image.Image:
    rng = np.random.default_rng(1)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_png_mode_decodes_as_pillow_converts_it(mode: str) -> None:
    picture = noise().convert(mode)
    found = decode_image(encoded(picture), LIMITS)
    assert (found.width, found.height) == (20, 10)
    assert np.array_equal(found.rgb, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "transparency"), [("P", bytes([0, 128, 255] * 4)), ("P", 3), ("L", 7), ("RGB", (1, 2, 3))]
)
def test_transparency_beside_the_pixels_changes_none_and_warns_of_nothing(mode: str, transparency: object) -> None:
    picture = noise().convert(mode)
    found = decode_image(encoded(picture, transparency=transparency), LIMITS)
    assert np.array_equal(found.rgb, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_notes_are_ignored_as_ofa_ignores_them(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(encoded(noise(), "JPEG", exif=exif), LIMITS)
    assert np.array_equal(found.rgb, decode_image(encoded(noise(), "JPEG"), LIMITS).rgb)


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_fifty_truncations_of_a_lossy_picture_are_refused(form: str) -> None:
    data = encoded(noise(64, 48), form)
    for step in range(50):
        with pytest.raises(MalformedImage):
            decode_image(data[: len(data) * step // 51], LIMITS)


@pytest.mark.parametrize(("form", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("WEBP", "RGBA")])
def test_other_formats_decode(form: str, mode: str) -> None:
    data = encoded(noise().convert(mode), form)
    assert np.array_equal(decode_image(data, LIMITS).rgb, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(("form", "enough"), [("JPEG", 0.5), ("PNG", 0.5), ("WEBP", 1.0)])
def test_a_size_is_read_without_the_pixels(form: str, enough: float) -> None:
    data = encoded(noise(64, 48), form)
    assert image_size(io.BytesIO(data[: int(len(data) * enough)]), LIMITS) == (64, 48)
    with pytest.raises(ImageTooLarge):
        image_size(io.BytesIO(data), ImageLimits(max_side=63))
    with pytest.raises(ImageTooLarge):
        image_size(io.BytesIO(data), ImageLimits(max_bytes=len(data) - 1))
    with pytest.raises(MalformedImage):
        image_size(io.BytesIO(data[:8]), LIMITS)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.array([[0, 257 * 100, 65_535]], dtype=np.uint16))
    assert decode_image(encoded(grey), LIMITS).rgb[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 500)])
def test_tiny_and_long_pictures_decode(size: tuple[int, int]) -> None:
    assert decode_image(encoded(Image.new("RGB", size)), LIMITS).rgb.shape == (size[1], size[0], 3)


def test_only_the_first_frame_counts() -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encoded(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    assert decode_image(data, LIMITS).rgb[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["GIF", "TIFF", "BMP", "ICO", "EPS", "PPM"])
def test_other_formats_are_refused(form: str) -> None:
    with pytest.raises(MalformedImage):
        decode_image(encoded(noise(16, 16), form), LIMITS)


def test_a_truncated_picture_is_refused() -> None:
    data = encoded(noise())
    pixels_end = len(data) - 24  # behind the pixels come their checksums and an end mark
    for cut in range(0, pixels_end, max(1, len(data) // 60)):
        with pytest.raises(MalformedImage):
            decode_image(data[:cut], LIMITS)


@pytest.mark.parametrize("limits", [ImageLimits(max_pixels=199), ImageLimits(max_side=19), ImageLimits(max_bytes=50)])
def test_one_over_a_limit_is_refused(limits: ImageLimits) -> None:
    with pytest.raises(ImageTooLarge):
        decode_image(encoded(noise()), limits)


@pytest.mark.parametrize("limits", [ImageLimits(max_pixels=200), ImageLimits(max_side=20)])
def test_at_the_limit_is_accepted(limits: ImageLimits) -> None:
    assert decode_image(encoded(noise()), limits).width == 20


def test_the_shipped_limit_stops_a_bomb_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(Image.new("1", (8192, 8192)))
    assert len(bomb) < 20_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the bomb was decoded"))
    with pytest.raises(ImageTooLarge):
        decode_image(bomb, LIMITS)


def test_both_base64_alphabets_are_understood() -> None:
    data = encoded(noise(33, 31))
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        assert decode_base64_image(encode(data).decode(), LIMITS).width == 33


@pytest.mark.parametrize(
    "text", ["", "%%%%", "AAAA\n", "QUJD=", "QUJ", "data:image/png;base64,AAAA", "ü" * 8, "http://127.0.0.1/x.png"]
)
def test_what_is_not_base64_of_a_picture_is_refused(text: str) -> None:
    with pytest.raises(PromptmuxError) as caught:
        decode_base64_image(text, LIMITS)
    assert isinstance(caught.value, MalformedImage)
    assert text == "" or text not in caught.value.message


def test_equal_bytes_of_another_shape_have_another_digest() -> None:
    wide, tall = Image.new("RGB", (30, 15)), Image.new("RGB", (15, 30))
    assert decode_image(encoded(wide), LIMITS).digest != decode_image(encoded(tall), LIMITS).digest


def test_preprocessing_is_pillow_bicubic_and_normalisation() -> None:
    picture = noise(37, 21)
    found = preprocess(decode_image(encoded(picture), LIMITS), 32, 0.5, 0.5)
    expected = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)).astype(np.float32) / 255.0
    assert found.shape == (3, 32, 32)
    torch.testing.assert_close(found, torch.from_numpy((expected - 0.5) / 0.5).permute(2, 0, 1))
