"""What a failing disk means to whoever changes the store."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from promptmux_prompts.errors import StorageFailed, StorageFull


@contextmanager
def storing() -> Iterator[None]:
    """Turn OSError into StorageFull or StorageFailed."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("The disk is full and nothing has changed; make room and try again.") from error
        raise StorageFailed("The disk failed and the old version stands; look at the registry's volume.") from error
