"""References to pictures: a file of a folder, or base64 within a line. Reads bytes and headers; decodes no pixels."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from promptmux_server.backbone.images import DecodedImage, ImageLimits, base64_bytes, decode_image, image_size
from promptmux_server.errors import ImageTooLarge, MalformedImage

SKETCH_BYTES = 4096

Size = tuple[int, int]
"""(width, height) of a stored picture in pixels."""


class UnreadablePicture(ValueError):
    """A picture that is not there or not readable; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class FilePicture:
    """A picture file; `name` is what the data call it."""

    path: Path
    name: str

    def read(self, limits: ImageLimits) -> bytes:
        """The encoded file; raises UnreadablePicture."""
        with self._opened() as file:
            return file.read(limits.max_bytes + 1)  # one byte too many is refused where the bytes are decoded

    def size(self, limits: ImageLimits) -> Size:
        """By the file's header, without reading the rest; raises UnreadablePicture."""
        with self._opened() as file, _as_unreadable(limits):
            return image_size(file, limits)

    def sketch(self) -> bytes:
        """What tells it from other pictures at the price of a look: its length, first and last bytes.

        Raises UnreadablePicture.
        """
        with self._opened() as file:
            length = file.seek(0, io.SEEK_END)
            file.seek(0)
            first = file.read(SKETCH_BYTES)
            file.seek(max(len(first), length - SKETCH_BYTES))
            return b"%d " % length + first + file.read(SKETCH_BYTES)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with self.path.open("rb") as file:
                yield file
        except FileNotFoundError as error:
            raise UnreadablePicture(
                "there is no such picture: check its name, and that the folder of pictures is the right one"
            ) from error
        except OSError as error:  # a folder, no permission, a name too long, a disk that fails
            raise UnreadablePicture("the picture's file cannot be read: check its kind and its permissions") from error


@dataclass(frozen=True)
class InlinePicture:
    """A picture in base64, either alphabet."""

    base64: str

    def sketch(self) -> bytes:
        """All of it, since it has been read already."""
        return self.base64.encode()

    def read(self, limits: ImageLimits) -> bytes:
        """The encoded file; raises UnreadablePicture."""
        with _as_unreadable(limits):
            return base64_bytes(self.base64, limits)

    def size(self, limits: ImageLimits) -> Size:
        """By the file's header; raises UnreadablePicture."""
        file = io.BytesIO(self.read(limits))
        with _as_unreadable(limits):
            return image_size(file, limits)


Picture = FilePicture | InlinePicture


def picture_in(folder: Path, name: str) -> FilePicture:
    """The picture that data name; raises UnreadablePicture for a name that leads out of the folder."""
    path = PurePosixPath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
        raise UnreadablePicture("a picture is named by its path within the folder of pictures, without ..")
    return FilePicture(folder / path, name)


def decoded(data: bytes, limits: ImageLimits) -> DecodedImage:
    """The pixels; raises UnreadablePicture."""
    with _as_unreadable(limits):
        return decode_image(data, limits)


@contextmanager
def _as_unreadable(limits: ImageLimits) -> Iterator[None]:
    """Requests are told to send something else; whoever has a data set must mend it."""
    try:
        yield
    except ImageTooLarge as error:
        raise UnreadablePicture(
            f"the picture is too large: make it at most {limits.max_bytes} bytes, {limits.max_side} pixels a side and "
            f"{limits.max_pixels} pixels in all"
        ) from error
    except MalformedImage as error:
        raise UnreadablePicture("the picture cannot be decoded: give a JPEG, PNG or WebP file") from error
