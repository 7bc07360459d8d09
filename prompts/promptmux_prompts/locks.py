"""Who waits for whom in the store, among all its threads and processes.

A lock ends with its holder, however that dies. They are taken in this order: changing or alone, then coming to life,
then one name (`Refs.lock`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from promptmux_prompts.disk import Disk


class Locks:
    """The locks of one store that are about all its names."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Beside others who change names, but not beside one who is alone."""
        with self._disk.lock("lock.turn"):  # whoever waits to be alone holds it, and so does not starve
            pass
        with self._disk.lock("lock", shared=True):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While nobody changes anything."""
        with self._disk.lock("lock.turn"), self._disk.lock("lock"):
            yield

    def coming_to_life(self) -> AbstractContextManager[None]:
        """While no other name begins to live, so that the living can be counted."""
        return self._disk.lock("lock.names")
