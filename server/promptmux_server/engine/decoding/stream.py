"""Hands a search's growing text to whoever listens, on the engine's thread.

Owns which requests have such a text: those whose kind is text, searched one token after the other. A listener that
raises is not called again; neither its request nor the batch is harmed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from promptmux_prompts import Kind
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.engine.decoding.protocol import Search
from promptmux_server.tasks.growing import GrowingText

log = logging.getLogger(__name__)

TEXT_KINDS: frozenset[Kind] = frozenset({"caption", "answer", "text"})


class TextStream:
    """One request's text on its way out; without a listener, or for a kind that is no text, it does nothing."""

    def __init__(self, search: Search, tokenizer: Tokenizer, kind: Kind, on_text: Callable[[str], None] | None) -> None:
        self._search = search
        self._text = GrowingText(tokenizer.decode)
        self._on_text = on_text if kind in TEXT_KINDS else None

    def step(self) -> None:
        """Pass on what the search's last step has made certain; to be called after each."""
        if self._on_text is not None and (tokens := self._search.tokens) is not None:
            self._pass(self._text.grow(tokens))

    def finish(self) -> None:
        """Pass on the rest, before the answer is given."""
        self.step()
        if self._on_text is not None:
            self._pass(self._text.finish())

    def _pass(self, piece: str) -> None:
        if not piece or self._on_text is None:
            return
        try:
            self._on_text(piece)
        except Exception:
            log.exception("a listener failed; it hears no more of its request")
            self._on_text = None
