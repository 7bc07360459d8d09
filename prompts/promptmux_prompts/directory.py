"""A directory of prompt files: all that can be served, and why the rest cannot."""

from __future__ import annotations

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


@dataclass(frozen=True)
class DirectoryReport:
    """Prompts by file name, and refusals."""

    prompts: tuple[Prompt, ...]
    refused: tuple[Refusal, ...]


def scan_directory(
    directory: Path, *, shape: PromptShape, fingerprint: str | None, dtype: torch.dtype
) -> DirectoryReport:
    """Read every `*.safetensors` of a directory; a bad one is reported and keeps no other from loading."""
    prompts, refused = [], []
    for path in sorted(directory.glob("*.safetensors")):
        try:
            prompt = load_prompt(path, shape=shape, fingerprint=fingerprint, dtype=dtype)
            if prompt.manifest.name != path.stem:
                raise InvalidPromptFile(f"the file must be named {prompt.manifest.name}.safetensors after its manifest")
            prompts.append(prompt)
        except PromptFileError as error:
            refused.append(Refusal(path.stem, error.code, str(error)))
        except OSError as error:
            refused.append(Refusal(path.stem, "invalid_prompt_file", f"cannot be read: {error.strerror}"))
    return DirectoryReport(tuple(prompts), tuple(refused))
