"""Where prompts that others have made are found: a folder of files, or the registry that a server keeps.

Servers themselves are asked by whoever opens a job, since training knows no network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from promptmux_prompts import (
    NameNotFound,
    Prompt,
    PromptFileError,
    Refusal,
    Store,
    StoreError,
    read_prompt,
)
from promptmux_prompts.format import read_bytes
from promptmux_prompts.refs import REFS
from promptmux_server.backbone.weights import LoadedBackbone
from promptmux_server.errors import TrainingConfigError


@dataclass(frozen=True, eq=False)
class Found:
    """A prompt, and the name that it is served under, which may be another than its own."""

    name: str
    prompt: Prompt


class Published(Protocol):
    """Prompts by name, read one at a time, since all of them together may be more than fits in memory."""

    def names(self) -> Iterable[str]:
        """All that there are; raises TrainingConfigError where they cannot be had."""
        ...

    def read(self, name: str) -> Found | Refusal:
        """What a name stands for, or why it cannot be used; raises TrainingConfigError as well."""
        ...


OpenPublished = Callable[[str, LoadedBackbone], Published]
"""Opens a place that a configuration names, for the prompts of a backbone; raises TrainingConfigError."""


class PublishedFolder:
    """A folder of prompt files, or a server's `registry` folder."""

    def __init__(self, place: str, backbone: LoadedBackbone) -> None:
        self._folder, self._backbone = Path(place), backbone
        if not self._folder.is_dir():
            raise TrainingConfigError("begin.among: there is no such folder: name one of prompt files, or a server.")
        try:
            self._store = Store.open(self._folder) if (self._folder / REFS).is_dir() else None
        except StoreError as error:
            raise TrainingConfigError(f"begin.among: the registry cannot be read: {error}.") from error

    def names(self) -> Iterable[str]:
        if self._store is None:
            return sorted(path.stem for path in self._folder.glob("*.safetensors"))
        return [head.name for head in self._store.heads() if not head.deleted]

    def read(self, name: str) -> Found | Refusal:
        if self._store is None:
            return read_file(self._folder / f"{name}.safetensors", self._backbone)
        try:
            head = self._store.head(name)
            if head is None:
                raise NameNotFound("no prompt has this name")
            return found(name, self._store.read(self._store.record(name, head.version)), self._backbone)
        except StoreError as error:
            return Refusal(name, error.code, str(error).rstrip("."))


def read_file(path: Path, backbone: LoadedBackbone) -> Found | Refusal:
    """A prompt file, under the name of its stem."""
    try:
        return found(path.stem, read_bytes(path, backbone.prompt_shape), backbone)
    except PromptFileError as error:
        return Refusal(path.stem, error.code, str(error))
    except OSError:
        return Refusal(path.stem, "invalid_prompt_file", "there is no such file, or it cannot be read")


def found(name: str, data: bytes, backbone: LoadedBackbone) -> Found | Refusal:
    """A prompt file's bytes under a name, if the backbone is the one that it was made for."""
    try:
        shape, fingerprint = backbone.prompt_shape, backbone.fingerprint
        return Found(name, read_prompt(data, shape=shape, fingerprint=fingerprint, dtype=torch.float32))
    except PromptFileError as error:
        return Refusal(name, error.code, str(error))
