"""Pictures of a call on their way from base64 to pixels: off the event loop, a few at a time, each of them once.

Owns the threads that may decode and the memory of what a picture turned out to be. Knows nothing of tasks.
"""

from __future__ import annotations

from typing import Self

import anyio

from promptmux_server.backbone.images import DecodedImage, ImageLimits, decode_base64_image
from promptmux_server.errors import PromptmuxError


class Picture:
    """A picture as it was sent; however many items look at it, it is decoded once and they share the pixels.

    It lasts until the last of them has let go: a call may outlive its items, and 50 MB are not kept for a slow reader.
    """

    def __init__(self, encoded: str) -> None:
        self._encoded = encoded
        self._users = 0
        self._lock = anyio.Lock()
        self._found: DecodedImage | PromptmuxError | None = None

    def shared(self) -> Self:
        """This picture, for one more item; each lets go of it once."""
        self._users += 1
        return self

    def let_go(self) -> None:
        self._users -= 1
        if not self._users:
            self._encoded, self._found = "", None

    async def decoded(self, limits: ImageLimits, decoders: anyio.CapacityLimiter) -> DecodedImage:
        """The pixels; raises MalformedImage or ImageTooLarge, to everyone who asks.

        Who waits for another's decoding holds no place in `decoders`.
        """
        async with self._lock:
            if self._found is None:
                self._found = await anyio.to_thread.run_sync(self._decode, limits, limiter=decoders)
        if isinstance(self._found, PromptmuxError):
            raise self._found
        return self._found

    def _decode(self, limits: ImageLimits) -> DecodedImage | PromptmuxError:
        try:
            return decode_base64_image(self._encoded, limits)
        except PromptmuxError as error:
            return error
