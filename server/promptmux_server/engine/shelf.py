"""Versions of the store as the engine serves them: where a record's file is, what it says, what its task takes.

Owns the way from a record to what the registry lists, for whoever changes names or follows those who did.
"""

from __future__ import annotations

from dataclasses import dataclass

from promptmux_prompts import Prompt, Store, VersionRecord
from promptmux_server.engine.prompt_files import PromptFiles
from promptmux_server.engine.prompt_versions import PromptSource
from promptmux_server.engine.registry import Listed
from promptmux_server.engine.request import TaskInputs
from promptmux_server.engine.task_specs import TaskSpecs
from promptmux_server.tasks import TaskSpec


@dataclass(frozen=True)
class Shelf:
    """One store, and the backbone's view of it."""

    store: Store
    files: PromptFiles
    specs: TaskSpecs

    def spec(self, prompt: Prompt) -> TaskSpec:
        """Of a prompt at hand; raises InvalidPromptFile."""
        return self.specs.make(prompt.digest, prompt.manifest)

    def source(self, record: VersionRecord) -> PromptSource:
        path = self.store.blob_path(record)
        return self.files.source(record.sha256, path, record.encoder_length, record.decoder_length)

    def listed(self, record: VersionRecord, spec: TaskSpec, pinned: bool) -> Listed:
        """A version as a name may stand for it."""
        inputs = TaskInputs(
            kind=spec.kind,
            takes_text=spec.takes_text,
            takes_premise=spec.manifest.takes_premise,
            takes_image=spec.takes_image,
        )
        return Listed(record, self.source(record), inputs, pinned)

    def read(self, record: VersionRecord, pinned: bool) -> Listed:
        """The same from its file alone; raises PromptFileError or OSError if that cannot be served."""
        return self.listed(record, self.specs.read(self.source(record)), pinned)
