"""Prompts that a training may begin from: those of a folder, or those that a running server has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from promptmux import Client, CorruptDownload, NotFound, PromptmuxError
from promptmux_prompts import Refusal
from promptmux_server.backbone.weights import LoadedBackbone
from promptmux_server.cli.prompt_refusals import explain
from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.job_config import SERVER
from promptmux_server.training.published import Found, Published, PublishedFolder, found


def published(place: str, backbone: LoadedBackbone) -> Published:
    """The prompts of a place as a configuration names it; raises TrainingConfigError."""
    return PublishedServer(place, backbone) if place.startswith(SERVER) else PublishedFolder(place, backbone)


class PublishedServer:
    """The present version of every prompt of a server; the key is read from PROMPTMUX_API_KEY."""

    def __init__(self, url: str, backbone: LoadedBackbone) -> None:
        self._url, self._backbone = url, backbone

    def names(self) -> Iterable[str]:
        with self._asked() as client:
            return [version.name for version in client.prompts.list()]

    def read(self, name: str) -> Found | Refusal:
        with self._asked() as client:
            try:
                return found(name, client.prompts.pull(name), self._backbone)
            except (CorruptDownload, NotFound) as error:
                return Refusal(name, "prompt_not_found", explain(error).rstrip("."))

    @contextmanager
    def _asked(self) -> Iterator[Client]:
        try:
            with Client(self._url) as client:
                yield client
        except PromptmuxError as error:
            raise TrainingConfigError(f"begin.among: the server does not help: {explain(error)}") from error
