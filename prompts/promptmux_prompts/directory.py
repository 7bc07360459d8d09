"""A directory of prompt files that others put there: every one that can be served, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from promptmux_prompts.errors import InvalidPromptFile, PromptFileError
from promptmux_prompts.format import Prompt, PromptShape, read_bytes, read_prompt
from promptmux_prompts.records import is_name


@dataclass(frozen=True, eq=False)
class Seed:
    """A good file: the name that its stem gives it, its bytes, and the prompt as it would be served."""

    name: str
    data: bytes
    prompt: Prompt


@dataclass(frozen=True)
class Refusal:
    """A file that is not served; `name` is its stem."""

    name: str
    code: str
    message: str


def read_seeds(
    directory: Path, *, shape: PromptShape, fingerprint: str | None, dtype: torch.dtype
) -> Iterator[Seed | Refusal]:
    """Read every prompt file of a directory, by name; a bad one is reported and keeps no other from being read.

    One at a time, since all of them together may be more than fits in memory.
    """
    for path in sorted(directory.glob("*.safetensors")):
        try:
            if not is_name(path.stem):
                raise InvalidPromptFile("the file must be called after its task: [a-z0-9][a-z0-9._-]{0,63}.safetensors")
            data = read_bytes(path, shape)
            prompt = read_prompt(data, shape=shape, fingerprint=fingerprint, dtype=dtype)
        except PromptFileError as error:
            yield Refusal(path.stem, error.code, str(error))
        except OSError as error:
            yield Refusal(path.stem, "invalid_prompt_file", f"cannot be read: {error.strerror}")
        else:
            yield Seed(path.stem, data, prompt)
