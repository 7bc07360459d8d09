"""Whether the picture files that data name are still those that a run began with.

Looks at the length and the ends of every file: pictures are compressed, so one that was changed differs there, while a
copy of a folder, with other times, is the same. Reading all of them would take as long as an epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from promptmux_server.errors import DataError
from promptmux_server.training.data.pictures import FilePicture, UnreadablePicture
from promptmux_server.training.data.survey import Rows


def pictures_digest(chosen: Iterable[Rows]) -> str:
    """sha256 over the names and sketches of all picture files, each once; raises DataError for a missing one."""
    sha, known = hashlib.sha256(), set()
    for rows in chosen:
        if rows.source.inline:
            continue
        for number in range(len(rows)):
            sample = rows.sample(number)
            picture = sample.picture
            if not isinstance(picture, FilePicture) or picture.path in known:
                continue
            known.add(picture.path)
            try:
                sketch = picture.sketch()
            except UnreadablePicture as error:
                place = rows.source.place(int(rows.lines[number]), sample.entry)
                raise DataError(f"{place}: {error}.") from error
            sha.update(f"\n{picture.name}\n".encode() + hashlib.sha256(sketch).digest())
    return sha.hexdigest()
