"""Changes of what is served: check, rehearse, make durable, and only then let requests see it.

The store makes a change durable and calls back, under the name's lock, to swap what the registry shows; so what is
acknowledged is seen by every later request, and memory is never ahead of the disk. Knows nothing of HTTP or of batches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from promptmux_prompts import (
    Expected,
    InvalidName,
    Manifest,
    NameNotFound,
    Prompt,
    PromptDigestMismatch,
    PromptFileError,
    Upload,
    VersionMismatch,
    VersionNotFound,
    VersionRecord,
)
from promptmux_prompts.faults import fault
from promptmux_prompts.records import is_name
from promptmux_server.engine.following import Follower
from promptmux_server.engine.publications import Change, PromptVersion
from promptmux_server.engine.registry import Registry
from promptmux_server.engine.request import PromptRef
from promptmux_server.engine.shelf import Shelf
from promptmux_server.tasks import TaskSpec

SEED_AUTHOR, SERVER_AUTHOR = "seed", "server"
ATTEMPTS = 8
"""To roll back a name that others keep changing."""

Rehearse = Callable[[Prompt, TaskSpec], None]
"""Try a prompt on the model, which no request notices; raises PromptRefused."""


class Publisher:
    """See `PromptsPort`; `follower` brings in what others do."""

    def __init__(self, shelf: Shelf, registry: Registry, rehearse: Rehearse, seeds: Path | None) -> None:
        self._shelf, self._store, self._registry, self._rehearse = shelf, shelf.store, registry, rehearse
        self.follower = Follower(shelf, registry, self._take_up, seeds)
        self._flagged: set[tuple[str, int]] = set()
        """Versions whose numbers were not finite: nobody is rolled back to them."""
        self.rolled_back = 0

    @property
    def max_bytes(self) -> int:
        return self._shelf.files.shape.max_bytes

    # -- changes ----------------------------------------------------------------------------------------------------

    def upload(self) -> Upload:
        return self._store.upload()

    def publish(self, name: str, upload: Upload, *, sha256: str, author: str, expected: Expected) -> Change:
        if not is_name(name):
            raise InvalidName("a name has 1 to 64 of a-z, 0-9, dot, dash and underscore, begins with a-z or 0-9, no ..")
        fault("publish.received")
        if upload.sha256 != sha256:
            raise PromptDigestMismatch("the bytes' sha256 is not the one announced")
        prompt = self._shelf.files.check(upload.read())
        spec = self._shelf.spec(prompt)
        fault("publish.checked")
        before = self._registry.get(name)
        if before is None or before.source.digest != prompt.digest:
            self._rehearse(prompt, spec)
        fault("publish.canaried")
        return self._publish(name, upload, prompt, spec, author=author, expected=expected)

    def _take_up(self, name: str, upload: Upload, prompt: Prompt) -> None:
        """A seed; one without canaries is believed, so that a start does not wait for the model."""
        spec = self._shelf.spec(prompt)
        if prompt.manifest.canary is not None:
            self._rehearse(prompt, spec)
        self._publish(name, upload, prompt, spec, author=SEED_AUTHOR, expected=None, seed=True)

    def _publish(
        self,
        name: str,
        upload: Upload,
        prompt: Prompt,
        spec: TaskSpec,
        *,
        author: str,
        expected: Expected,
        seed: bool = False,
    ) -> Change:
        changed = False

        def swap(record: VersionRecord) -> None:
            nonlocal changed
            changed = self._registry.adopt(self._shelf.listed(record, spec, self._is_pinned(name)))

        said = prompt.manifest
        with self._registry.coming(said.encoder_length, said.decoder_length):
            record = self._store.publish(
                name, upload, prompt, author=author, expected=expected, seed=seed, on_head=swap
            )
        self._registry.offer(prompt)
        return Change(self._shown(record, said), changed)

    def rollback(self, name: str, *, to: int | None, author: str, expected: Expected) -> Change:
        for _ in range(ATTEMPTS):
            head = self._store.head(name)
            if head is None or head.deleted:
                raise NameNotFound("No prompt has this name; list the prompts to see those that exist.")
            target = self._store.record(name, to) if to is not None else self._newest_good(name, below=head.version)
            try:
                # Where the caller expects nothing, what was looked at must still be so when the name moves.
                return self._roll_back(target, author, head.version if expected is None else expected)
            except VersionMismatch:
                if expected is not None:
                    raise
        raise VersionMismatch("others keep changing this name; look at what it stands for and try again")

    def _roll_back(self, target: VersionRecord, author: str, expected: Expected) -> Change:
        listed = self._shelf.read(target, self._is_pinned(target.name))
        changed = False

        def swap(_: VersionRecord) -> None:
            nonlocal changed
            changed = self._registry.adopt(listed)

        with self._registry.coming(target.encoder_length, target.decoder_length):
            self._store.rollback(target.name, author=author, to=target.version, expected=expected, on_head=swap)
        return Change(self._shown(target, self._shelf.specs.read(listed.source).manifest), changed)

    def roll_back_nonfinite(self, ref: PromptRef) -> PromptRef | None:
        """Take a version back whose numbers were not finite; None if the name stands for another one already.

        Raises VersionNotFound if there is no good one before it.
        """
        self._flagged.add((ref.name, ref.version))
        target = self._newest_good(ref.name, below=ref.version)
        try:
            self._roll_back(target, SERVER_AUTHOR, ref.version)
        except VersionMismatch:
            return None
        self.rolled_back += 1
        return PromptRef(target.name, target.version, target.sha256)

    def _newest_good(self, name: str, below: int) -> VersionRecord:
        """The newest kept version below another that can be served and was not flagged."""
        for record in reversed(self._store.versions(name)):
            if record.version >= below or (name, record.version) in self._flagged:
                continue
            try:
                self._shelf.read(record, pinned=False)
            except (PromptFileError, OSError):
                continue
            return record
        raise VersionNotFound("No earlier version of this prompt can be served. Publish a good one.")

    def delete(self, name: str, *, author: str, expected: Expected) -> None:
        self._store.delete(name, author=author, expected=expected, on_head=lambda: self._registry.forget(name))

    def set_pinned(self, name: str, pinned: bool, *, author: str) -> PromptVersion:
        was = self._registry.listed(name).pinned
        self._registry.set_pinned(name, pinned)
        try:
            self._store.set_pinned(name, pinned, author=author)
        except BaseException:
            self._registry.set_pinned(name, was)
            raise
        return self.current(name)

    def _is_pinned(self, name: str) -> bool:
        listed = self._registry.get(name)
        return listed is not None and listed.pinned

    # -- what can be seen -------------------------------------------------------------------------------------------

    def current(self, name: str) -> PromptVersion:
        listed = self._registry.listed(name)
        return self._shown(listed.record, self._shelf.specs.of(listed.source).manifest)

    def page(self, after: str, limit: int) -> tuple[list[PromptVersion], str | None]:
        names = self._registry.names(after, limit + 1)
        listed = (self._registry.get(name) for name in names[:limit])
        shown = [PromptVersion(record=found.record, current=True, pinned=found.pinned) for found in listed if found]
        return shown, names[limit - 1] if len(names) > limit else None

    def versions(self, name: str) -> list[PromptVersion]:
        found = [self._shown(record) for record in reversed(self._store.versions(name))]
        if not found:
            self._registry.listed(name)  # says why
            raise NameNotFound("No prompt has this name; list the prompts to see those that exist.")
        return found

    def file(self, name: str, version: int) -> tuple[VersionRecord, bytes]:
        record = self._store.record(name, version)
        return record, self._store.read(record)

    def _shown(self, record: VersionRecord, manifest: Manifest | None = None) -> PromptVersion:
        listed = self._registry.get(record.name)
        current = listed is not None and listed.record.version == record.version
        return PromptVersion(
            record=record, current=current, pinned=listed is not None and listed.pinned, manifest=manifest
        )
