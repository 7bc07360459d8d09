"""Text that grows: from the tokens of one search, piece by piece, to exactly the text that the answer will have.

Owns what may be shown already. A token may end within a UTF-8 character, and the final text has no blanks at its ends:
what might still change is held back until it cannot. Knows no search and nobody who listens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""How a decoder writes bytes that are no character, and so also the beginning of one."""


class GrowingText:
    """All pieces together are `decode(tokens).strip()` of the last tokens given."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """`decode` joins texts where it joins tokens, except within a character."""
        self._decode = decode
        self._count = 0
        """Tokens seen."""
        self._undecided: tuple[int, ...] = ()
        """The last of them, from a character's beginning on, that do not end with a whole character."""
        self._blanks = ""
        """Behind what was given out: a part of the text if something follows."""
        self._begun = False

    def grow(self, tokens: tuple[int, ...]) -> str:
        """What is certain now and was not before, often nothing; `tokens` are all so far, in order."""
        self._undecided += tokens[self._count :]
        self._count = len(tokens)
        text = self._decode(self._undecided)
        return "" if text.endswith(UNFINISHED) else self._settle(text)

    def finish(self) -> str:
        """The last piece: what was held back and is text after all."""
        return self._settle(self._decode(self._undecided))

    def _settle(self, text: str) -> str:
        self._undecided = ()
        text = self._blanks + text
        if not self._begun:
            text = text.lstrip()
        piece = text.rstrip()
        self._blanks = text[len(piece) :]
        self._begun = self._begun or bool(piece)
        return piece
