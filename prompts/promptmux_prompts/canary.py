"""A canary: an input with the tokens that the publisher's own model wrote for it, carried in a prompt's manifest.

Owns the fields, their bounds and their JSON. What runs one, and what becomes of a prompt that fails it, belongs to
whoever serves prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from promptmux_prompts.errors import InvalidPromptFile

MAX_CANARIES = 16
MAX_TOKENS = 257
"""256 generated ones, and eos."""
MAX_TEXT = 4096
MAX_PICTURE_BYTES = 32 * 1024
MAX_PICTURE_CHARACTERS = (MAX_PICTURE_BYTES + 2) // 3 * 4


@dataclass(frozen=True, kw_only=True)
class Canary:
    """Checked on construction. Raises InvalidPromptFile."""

    tokens: tuple[int, ...]
    """What greedy search wrote, eos at the end; the decoder's prefix is not among them."""
    text: str | None = None
    premise: str | None = None
    image: str | None = None
    """A small PNG in base64."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.tokens) <= MAX_TOKENS or not all(_is_token(token) for token in self.tokens):
            raise InvalidPromptFile(f"a canary's tokens must be 1 to {MAX_TOKENS} token ids")
        for name, most in (("text", MAX_TEXT), ("premise", MAX_TEXT), ("image", MAX_PICTURE_CHARACTERS)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and len(value) <= most):
                raise InvalidPromptFile(f"a canary's {name} must be a text of at most {most} characters")

    def to_dict(self) -> dict[str, Any]:
        """What stands in the manifest: only the fields that are given."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if value is not None}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Unknown or missing keys and wrong types raise InvalidPromptFile."""
        if set(raw) - {field.name for field in fields(cls)} or not isinstance(raw.get("tokens"), list):
            raise InvalidPromptFile("a canary holds text, premise or image, and a list of tokens, and nothing else")
        return cls(**{**raw, "tokens": tuple(raw["tokens"])})


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
