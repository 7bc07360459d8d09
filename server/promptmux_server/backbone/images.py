"""Pictures from bytes to the model's input, within limits that are checked before anything is decoded (ofa-spec 8).

The only place that opens pictures. EXIF orientation is not applied: OFA does not, and its boxes refer to stored pixels.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pybase64
import torch
from PIL import Image
from torch import Tensor

from promptmux_server.errors import ImageTooLarge, MalformedImage

FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost: the defaults bound one decoded picture to about 50 MB."""

    max_bytes: int = 10_000_000
    max_pixels: int = 16_777_216
    max_side: int = 8192


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An RGB picture (H, W, 3) uint8; `digest` is the sha256 of its size and pixels."""

    rgb: npt.NDArray[np.uint8]
    digest: str

    @property
    def width(self) -> int:
        return int(self.rgb.shape[1])

    @property
    def height(self) -> int:
        return int(self.rgb.shape[0])


def decode_base64_image(text: str, limits: ImageLimits) -> DecodedImage:
    """Decode base64 in the standard or URL-safe alphabet, padded and without blanks; raises as `decode_image`."""
    return decode_image(base64_bytes(text, limits), limits)


def base64_bytes(text: str, limits: ImageLimits) -> bytes:
    """The picture file that a base64 text stands for, not decoded; raises MalformedImage, ImageTooLarge."""
    if len(text) > (limits.max_bytes + 2) // 3 * 4:
        raise ImageTooLarge(f"The picture has more than {limits.max_bytes} bytes.", param="image")
    try:
        return pybase64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except ValueError as error:  # binascii.Error, or text beyond ASCII
        raise MalformedImage(
            "`image` is not base64. Send the bytes of a file, base64-encoded.", param="image"
        ) from error


def decode_image(data: bytes, limits: ImageLimits) -> DecodedImage:
    """Decode a JPEG, PNG or WebP file (first frame) to RGB; raises MalformedImage, ImageTooLarge."""
    with _opened(io.BytesIO(data), len(data), limits) as picture:
        picture.load()
        picture.info.pop("transparency", None)  # OFA drops it too; Pillow would warn about each such palette
        rgb = np.asarray(_eight_bits(picture).convert("RGB"))
    return from_array(rgb)


def image_size(file: BinaryIO, limits: ImageLimits) -> tuple[int, int]:
    """(width, height) by a file's header, its pixels unread; raises as `decode_image`."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    with _opened(file, length, limits) as picture:
        return picture.size


@contextmanager
def _opened(file: BinaryIO, length: int, limits: ImageLimits) -> Iterator[Image.Image]:
    """The file's first frame, its size checked; whatever goes wrong within becomes one of our errors."""
    if length > limits.max_bytes:
        raise ImageTooLarge(f"The picture has more than {limits.max_bytes} bytes.", param="image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as picture:
                _check_size(picture.width, picture.height, limits)
                yield picture
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageTooLarge("The picture has too many pixels.", param="image") from error
    except ImageTooLarge:
        raise
    except Exception as error:  # Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error, ...
        raise MalformedImage("The picture cannot be decoded. Send a JPEG, PNG or WebP file.", param="image") from error


def from_array(rgb: npt.NDArray[np.uint8]) -> DecodedImage:
    """A picture that is in memory already, (H, W, 3) uint8."""
    pixels = np.ascontiguousarray(rgb)
    sha = hashlib.sha256(f"{pixels.shape}".encode())
    sha.update(pixels.data)
    return DecodedImage(pixels, sha.hexdigest())


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"The picture is larger than {limits.max_side} pixels a side or {limits.max_pixels} in all.", param="image"
        )
    if min(width, height) < 1:
        raise MalformedImage("The picture has no pixels.", param="image")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion would clip it to white."""
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64).clip(0, 65_535) // 257
    return Image.fromarray(values.astype(np.uint8))


def preprocess(image: DecodedImage, size: int, mean: float, std: float) -> Tensor:
    """The model's input (3, size, size) float32: bicubic resize, aspect not kept, then (x / 255 - mean) / std.

    Computed by numpy, on the calling thread alone: this runs beside the engine, whose products want every core, and
    torch's count of threads cannot be lowered for one thread without lowering it for all.
    """
    picture = Image.fromarray(image.rgb)
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)
    return torch.from_numpy((pixels / 255.0 - mean) / std)
