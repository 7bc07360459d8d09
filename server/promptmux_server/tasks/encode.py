"""From a user's text to token ids: instruction, decoder prefix, and the closed answer set where a task has one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from promptmux_server.backbone.config import BOS
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.errors import InvalidParameter
from promptmux_server.tasks.spec import TaskSpec
from promptmux_server.tasks.text import as_question, clean

MAX_TEXT_CHARACTERS = 4096

_PLACEHOLDER = re.compile(r"\{(text|premise)\}")
"""Both are filled in one pass, so that braces in a user's text stay text."""


@dataclass(frozen=True)
class EncodedItem:
    """Encoder ids (bos ... eos), decoder prefix (bos ...), and the answers to choose from, in the manifest's order."""

    source_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...] | None


def encode_item(spec: TaskSpec, tokenizer: Tokenizer, text: str | None, premise: str | None) -> EncodedItem:
    """Raises InvalidParameter for a text that the task needs, does not take, or that is too long."""
    filled = {
        "text": _checked("text", text, spec.takes_text),
        "premise": _checked("premise", premise, spec.manifest.takes_premise),
    }
    if spec.kind == "answer" and text is not None:
        filled["text"] = as_question(filled["text"])
    source = _PLACEHOLDER.sub(lambda match: filled[match[1]], spec.manifest.instruction)
    source_ids = tokenizer.source_ids(source)
    prefix = source_ids[:-1] if spec.manifest.decoder_input == "source" else [BOS]
    answers = spec.manifest.answers
    candidates = None if answers is None else _encoded(tokenizer, answers)
    return EncodedItem(tuple(source_ids), tuple(prefix), candidates)


@lru_cache(maxsize=256)
def _encoded(tokenizer: Tokenizer, answers: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Kept, because a task's answers are the same for every request: 3,129 of VQA take tens of milliseconds."""
    return tuple(tuple(tokenizer.encode(f" {answer}")) for answer in answers)


def _checked(name: str, value: str | None, wanted: bool) -> str:
    if value is None:
        if wanted:
            raise InvalidParameter(f"This task needs `{name}`; see its instruction in GET /v1/tasks.", param=name)
        return ""
    if not wanted:
        raise InvalidParameter(f"This task takes no `{name}`: leave it out.", param=name)
    if len(value) > MAX_TEXT_CHARACTERS:
        raise InvalidParameter(f"`{name}` has more than {MAX_TEXT_CHARACTERS} characters.", param=name)
    cleaned = clean(value)
    if not cleaned:
        raise InvalidParameter(f"`{name}` is empty.", param=name)
    return cleaned
