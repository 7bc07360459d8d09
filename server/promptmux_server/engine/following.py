"""Following what others do to the registry: files that were put into the prompt directory, other processes' changes.

A file of the directory is a seed: it is taken up once, as a version of the name that its stem gives, and again when it
has changed; so it overrides nothing that was published, rolled back or deleted since. A bad one harms nothing. Reads
what changed and says what came of it; how a version is published is `publisher`'s.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Protocol

from promptmux_prompts import BlobCorrupt, Head, Prompt, PromptFileError, Refusal, Seed, StoreError, Upload
from promptmux_server.engine.registry import Listed, Registry
from promptmux_server.engine.request import ReloadReport, TaskProblem
from promptmux_server.engine.shelf import Shelf
from promptmux_server.errors import PromptmuxError

log = logging.getLogger(__name__)

QUARANTINED = TaskProblem("prompt_quarantined", "What is stored of this prompt is damaged. Publish it again.")


class TakeUp(Protocol):
    """Publishes a checked seed."""

    def __call__(self, name: str, upload: Upload, prompt: Prompt, /) -> object: ...


class Follower:
    """Brings the registry up to date with the disk; one pass at a time."""

    def __init__(self, shelf: Shelf, registry: Registry, take_up: TakeUp, seeds: Path | None) -> None:
        self._shelf, self._registry, self._take_up, self._seeds = shelf, registry, take_up, seeds
        self._passing = threading.Lock()  # an older view of the disk must not overtake a newer one

    def recover(self, *, fall_back: bool) -> None:
        """Before the first pass: what is damaged is set aside, and its name stands for an older version if it may."""
        recovery = self._shelf.store.recover(fall_back=fall_back)
        for damage in recovery.damaged:
            log.warning(
                "prompt %s: version %s is damaged, %s; now it stands for version %s",
                *(damage.name, damage.version, damage.reason, damage.fallback),
            )

    def reload(self) -> ReloadReport:
        """Look at every HEAD and every seed."""
        with self._passing:
            before = self._registry.digests()
            problems: dict[str, TaskProblem] = {}
            heads = {head.name: head for head in self._shelf.store.heads()}
            for head in heads.values():
                self._follow(head, problems)
            for name in before.keys() - heads.keys():
                problems[name] = QUARANTINED  # its HEAD cannot be read; what is in memory is served
            if self._seeds is not None:
                for entry in self._shelf.files.seeds(self._seeds):
                    self._take(entry, problems)
            self._registry.refuse(problems)
            return _report(before, self._registry.digests(), problems)

    def _follow(self, head: Head, problems: dict[str, TaskProblem]) -> None:
        """One name, as far as another process has changed it."""
        before = self._registry.get(head.name)
        if head.deleted:
            self._registry.follow(head.name, before, None)
        elif before is not None and (before.record.version, before.pinned) == (head.version, head.pinned):
            if not _is_whole(before):
                self._registry.lose(head.name)
                problems[head.name] = QUARANTINED
        else:
            try:
                record = self._shelf.store.record_of(head, head.version)
                listed = self._shelf.read(record, head.pinned)
                with self._registry.coming(record.encoder_length, record.decoder_length):
                    self._registry.follow(head.name, before, listed)
            except (BlobCorrupt, OSError):
                problems[head.name] = QUARANTINED
            except (PromptFileError, StoreError, PromptmuxError) as error:
                problems[head.name] = TaskProblem(error.code, str(error))

    def _take(self, entry: Seed | Refusal, problems: dict[str, TaskProblem]) -> None:
        """One file of the directory, if it is new."""
        if isinstance(entry, Refusal):
            problems[entry.name] = TaskProblem(entry.code, entry.message)
            return
        try:
            head = self._shelf.store.head(entry.name)
            if head is not None and self._is_taken(entry, head):
                return
            with self._shelf.store.upload() as upload:
                upload.write(entry.data)
                self._take_up(entry.name, upload, entry.prompt)
        except (PromptFileError, StoreError, PromptmuxError) as error:
            problems[entry.name] = TaskProblem(error.code, str(error))
        else:
            problems.pop(entry.name, None)

    def _is_taken(self, seed: Seed, head: Head) -> bool:
        """Whether a seed was taken up before, and its name has since been served or deleted."""
        return head.seed == seed.prompt.digest and (head.deleted or self._registry.get(seed.name) is not None)


def _is_whole(listed: Listed) -> bool:
    """Whether a version's file is there in its full length; its content is checked whenever it is loaded."""
    try:
        return listed.source.path.stat().st_size == listed.record.bytes
    except OSError:
        return False


def _report(before: dict[str, str], after: dict[str, str], refused: dict[str, TaskProblem]) -> ReloadReport:
    return ReloadReport(
        added=tuple(sorted(after.keys() - before.keys())),
        changed=tuple(sorted(name for name in after if before.get(name, after[name]) != after[name])),
        removed=tuple(sorted(before.keys() - after.keys())),
        unchanged=tuple(sorted(name for name in after if before.get(name) == after[name] and name not in refused)),
        refused=refused,
    )
