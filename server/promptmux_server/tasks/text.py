"""Cleaning and instruction templates, as OFA's data readers apply them (ofa-spec 6, 7)."""

from __future__ import annotations

import re

MAX_SOURCE_WORDS = 80

INSTRUCTIONS = {
    "caption": " what does the image describe?",
    "vqa": " {text}",
    "entailment": ' does the image describe " {text} "?',
    "entailment_with_premise": ' can image and text1 " {premise} " imply text2 " {text} "?',
    "grounding": ' which region does the text " {text} " describe?',
}
"""The instructions that OFA is finetuned and prompt-tuned with; mind the leading blank."""


def clean(text: str, *, max_words: int = MAX_SOURCE_WORDS) -> str:
    """Lower-case, without leading punctuation, dashes and slashes as blanks, at most `max_words` words."""
    text = text.lower().lstrip(",.!?*#:;~").replace("-", " ").replace("/", " ")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def clean_caption(text: str, *, max_words: int = MAX_SOURCE_WORDS) -> str:
    """The same, with the placeholder that caption data have for people."""
    return clean(text.lower().replace("<person>", "person"), max_words=max_words)


def as_question(text: str) -> str:
    """A question ends with a question mark."""
    return text if text.endswith("?") else f"{text}?"
