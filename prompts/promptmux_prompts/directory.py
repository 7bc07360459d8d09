"""A directory of prompt files: all that can be served, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from promptmux_prompts.errors import InvalidPromptFile, PromptFileError
from promptmux_prompts.format import Prompt, PromptShape, load_prompt


@dataclass(frozen=True)
class Refusal:
    """A file that is not served; `name` is its stem."""

    name: str
    code: str
    message: str


def prompt_path(directory: Path, name: str) -> Path:
    """Where a directory keeps the prompt of this name."""
    return directory / f"{name}.safetensors"


def scan_directory(
    directory: Path, *, shape: PromptShape, fingerprint: str | None, dtype: torch.dtype
) -> Iterator[Prompt | Refusal]:
    """Read every prompt file of a directory, by name; a bad one is reported and keeps no other from loading.

    One at a time, since all of them together may be more than fits in memory.
    """
    for path in sorted(directory.glob("*.safetensors")):
        try:
            prompt = load_prompt(path, shape=shape, fingerprint=fingerprint, dtype=dtype)
            if prompt.manifest.name != path.stem:
                raise InvalidPromptFile(f"the file must be named {prompt.manifest.name}.safetensors after its manifest")
        except PromptFileError as error:
            yield Refusal(path.stem, error.code, str(error))
        except OSError as error:
            yield Refusal(path.stem, "invalid_prompt_file", f"cannot be read: {error.strerror}")
        else:
            yield prompt
