"""Pictures of a call on their way from base64 to pixels: off the event loop, a few at a time, each of them once.

Owns the threads that may decode and the memory of what a picture turned out to be. Knows nothing of tasks.
"""

from __future__ import annotations

import anyio

from promptmux_server.backbone.images import DecodedImage, ImageLimits, decode_base64_image
from promptmux_server.errors import PromptmuxError


class Picture:
    """A picture as it was sent; however many items look at it, it is decoded once and they share the pixels."""

    def __init__(self, encoded: str) -> None:
        self._encoded = encoded
        self._lock = anyio.Lock()
        self._found: DecodedImage | PromptmuxError | None = None

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
