"""Pictures on their way to tokens: each distinct one is prepared once and passes the stem once, whoever asks for it.

Resizing runs on threads of its own, the stem on the engine's. Knows nothing of tasks beyond how a picture is prepared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.image_key import ImageKey
from promptmux_server.backbone.images import DecodedImage, preprocess
from promptmux_server.backbone.model import OFA
from promptmux_server.engine.device_faults import in_parts_that_fit
from promptmux_server.engine.image_cache import ImageCache

PICTURES_PER_STEM_PASS = 8


@dataclass(eq=False)
class Picture:
    """A picture that somebody asks about: `seen` by the stem already, or on its way there as `pixels` (3, S, S)."""

    image: DecodedImage
    key: ImageKey
    length: int
    """Tokens that it will be."""
    seen: ImageTokens | None = None
    failure: Exception | None = None
    """Why the stem could not see it."""
    pixels: Future[Tensor] = field(default_factory=Future)
    started: bool = False

    @property
    def ready(self) -> bool:
        """Whether nothing but the stem lies before its tokens, or its failure."""
        return self.seen is not None or self.pixels.done()


class Pictures:
    """Every picture that a waiting or running request asks about, and a cache of those seen lately."""

    def __init__(self, model: OFA, cache_bytes: int, on_ready: Callable[[], None]) -> None:
        self._model, self._on_ready = model, on_ready
        self.cache = ImageCache(cache_bytes)
        self._current: WeakValueDictionary[ImageKey, Picture] = WeakValueDictionary()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="promptmux-images")

    def find(self, image: DecodedImage, key: ImageKey) -> Picture:
        """The picture of this key that others ask about too, or else a new one."""
        with self._lock:
            picture = self._current.get(key)
            if picture is None:
                length = self._model.config.patches(key.size) ** 2
                picture = self._current[key] = Picture(image, key, length)
            kept = self.cache.get(key)
            picture.seen = picture.seen or kept
            return picture

    def prepare(self, picture: Picture) -> None:
        """Begin to resize and normalise it, unless that has begun or it is seen."""
        with self._lock:
            if picture.started or picture.seen is not None:
                return
            picture.started = True
        self._threads.submit(self._prepare, picture)

    def _prepare(self, picture: Picture) -> None:
        key = picture.key
        try:
            picture.pixels.set_result(preprocess(picture.image, key.size, key.mean, key.std))
        except Exception as error:
            picture.pixels.set_exception(error)
        self._on_ready()

    def see(self, pictures: Sequence[Picture]) -> None:
        """Run the stem over pictures not seen yet, those of one size together; each ends seen or with its failure."""
        parts: dict[tuple[object, int], list[Picture]] = {}
        for picture in pictures:
            if picture.failure is not None:
                continue
            picture.failure = picture.pixels.exception()  # type: ignore[assignment]  # never a BaseException: `_prepare`
            if picture.failure is None:
                parts.setdefault((picture.key if picture.key.alone else None, picture.key.size), []).append(picture)
        for part in parts.values():
            for start in range(0, len(part), PICTURES_PER_STEM_PASS):
                in_parts_that_fit(part[start : start + PICTURES_PER_STEM_PASS], self._stem, self._keep, _give_up)

    def _stem(self, part: Sequence[Picture]) -> list[ImageTokens]:
        return self._model.image_tokens(torch.stack([picture.pixels.result() for picture in part]))

    def _keep(self, part: Sequence[Picture], tokens: Sequence[ImageTokens]) -> None:
        for picture, found in zip(part, tokens, strict=True):
            picture.seen = found
            self.cache.put(picture.key, found)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _give_up(picture: Picture, error: Exception) -> None:
    picture.failure = error
