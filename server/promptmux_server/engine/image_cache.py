"""Pictures that the stem has seen lately, so that it sees each once: least recently used out, bounded in bytes.

One cache serves one model. Nothing that a prompt holds reaches a picture before the first encoder layer, so replacing a
prompt can make no entry stale. Knows nothing of requests.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.image_key import ImageKey
from promptmux_server.engine.request import ImageCacheStats


class ImageCache:
    """Image tokens by key, at most `budget_bytes` of them; safe to use from many threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._entries: OrderedDict[ImageKey, ImageTokens] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes = self._hits = self._misses = 0

    def get(self, key: ImageKey) -> ImageTokens | None:
        """The picture's tokens, which the caller may keep however long the cache does."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self._misses += 1
                return None
            self._entries.move_to_end(key)
            self._hits += 1
            return found

    def put(self, key: ImageKey, image: ImageTokens) -> None:
        """Keep a copy; a picture larger than the whole budget is not kept."""
        size = image.tokens.nbytes
        if size > self._budget:
            return
        # A copy, because tokens are a slice of their stem pass, all of which a slice would keep alive.
        own = replace(image, tokens=image.tokens.clone())
        with self._lock:
            if (old := self._entries.pop(key, None)) is not None:
                self._bytes -= old.tokens.nbytes
            while self._bytes + size > self._budget:
                _, oldest = self._entries.popitem(last=False)
                self._bytes -= oldest.tokens.nbytes
            self._entries[key] = own
            self._bytes += size

    def stats(self) -> ImageCacheStats:
        with self._lock:
            return ImageCacheStats(self._bytes, len(self._entries), self._hits, self._misses)
