"""What prompt versions say of themselves, made ready to use: kept for those asked last, read again for the others.

Bounded in bytes, because there may be far more tasks than anybody asks; a closed answer set alone can take 200 KB.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict

from promptmux_prompts import Manifest, PromptFileError
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.engine.prompt_files import PromptFiles
from promptmux_server.engine.prompt_versions import PromptSource
from promptmux_server.errors import PromptQuarantined
from promptmux_server.tasks import TaskSpec

BUDGET_BYTES = 16 << 20
LEAST_BYTES = 4096
"""About what a spec takes without its answers and canaries."""
ANSWER_BYTES = 160
"""About what an answer takes, as a text and as a label."""

log = logging.getLogger(__name__)


class TaskSpecs:
    """Specs by digest, least recently used out; safe to use from many threads."""

    def __init__(self, files: PromptFiles, config: BackboneConfig, budget_bytes: int = BUDGET_BYTES) -> None:
        self._files, self._config, self._budget = files, config, budget_bytes
        self._kept: OrderedDict[str, tuple[TaskSpec, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def make(self, digest: str, manifest: Manifest) -> TaskSpec:
        """The spec of a manifest that is at hand; raises InvalidPromptFile if this server cannot serve it."""
        spec = TaskSpec.from_manifest(manifest, self._config)
        answers, canaries = manifest.answers or (), manifest.canary or ()
        size = LEAST_BYTES + sum(ANSWER_BYTES + len(answer) for answer in answers)
        size += sum(len(canary.image or "") + 8 * len(canary.tokens) for canary in canaries)
        with self._lock:
            if digest not in self._kept:
                self._kept[digest] = (spec, size)
                self._bytes += size
            while self._bytes > self._budget and len(self._kept) > 1:
                _, (_, freed) = self._kept.popitem(last=False)
                self._bytes -= freed
        return spec

    def read(self, source: PromptSource) -> TaskSpec:
        """The spec of a version, from its file if need be; raises PromptFileError or OSError."""
        with self._lock:
            if source.digest in self._kept:
                self._kept.move_to_end(source.digest)
                return self._kept[source.digest][0]
        return self.make(source.digest, self._files.manifest(source))

    def of(self, source: PromptSource) -> TaskSpec:
        """The same for a request, which is told PromptQuarantined."""
        try:
            return self.read(source)
        except (PromptFileError, OSError) as error:
            log.warning("the file of prompt %s can no longer be read: %s", source.digest[:12], error)
            message = "This task's prompt file can no longer be read. Publish it again, or roll it back."
            raise PromptQuarantined(message, param="task") from error
