"""The nouns of the store and their JSON: a version's record, which never changes, and a name's HEAD, which moves.

Knows nothing of files. A record that cannot be read as what it must be raises BlobCorrupt.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Literal, Self

from promptmux_prompts.errors import BlobCorrupt, PromptFileError, VersionMismatch
from promptmux_prompts.manifest import NAME
from promptmux_prompts.strict_json import canonical, parse

SCHEMA = 1
MAX_RECORD_BYTES = 4096
_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "str | None": (str, type(None))}


class Absent(Enum):
    """Type of ABSENT."""

    ABSENT = "absent"


ABSENT: Literal[Absent.ABSENT] = Absent.ABSENT
"""Expected of a name that must not exist yet, or must have been deleted."""

Expected = int | Absent | None
"""What HEAD must stand at before a change: a version, ABSENT, or None for whatever it stands at."""


def is_name(name: str) -> bool:
    """Whether a prompt may be called so; such a name is one plain component of a path."""
    return bool(NAME.fullmatch(name)) and ".." not in name


@dataclass(frozen=True)
class _Record:
    """JSON with exactly the fields of the dataclass, each of its own type."""

    def to_json(self) -> str:
        return canonical(asdict(self) | {"schema": SCHEMA})

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Parse; raises BlobCorrupt."""
        try:
            raw = parse(text, "record")
        except PromptFileError as error:
            raise BlobCorrupt("a record of the store is not strict JSON") from error
        if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
            raise BlobCorrupt(f"a record of the store must have schema {SCHEMA}")
        return cls.from_fields(raw)

    @classmethod
    def from_fields(cls, raw: dict[str, Any]) -> Self:
        """Of values by name; raises BlobCorrupt."""
        types = {field.name: _TYPES[str(field.type)] for field in fields(cls)}
        if raw.keys() != types.keys() or any(type(raw[name]) not in allowed for name, allowed in types.items()):
            raise BlobCorrupt("a record of the store lacks fields or has some of the wrong type")
        return cls(**raw)


@dataclass(frozen=True)
class VersionRecord(_Record):
    """One version of one name, for ever."""

    name: str
    version: int
    """From 1, per name; never given twice, not even after a delete."""
    sha256: str
    """Digest of the content, as `Prompt.digest`."""
    file_sha256: str
    """Of the file's bytes; names the blob."""
    bytes: int
    """Of the file."""
    encoder_length: int
    decoder_length: int
    created: str
    """RFC 3339, UTC."""
    author: str
    """Name of the key that published it, "seed" or "local"."""


@dataclass(frozen=True)
class Head(_Record):
    """What a name stands for."""

    name: str
    version: int
    latest: int
    """The highest version ever given; versions above it were never finished."""
    floor: int
    """The lowest version that may still be read: a delete raises it above all that was published before."""
    deleted: bool
    pinned: bool
    seed: str | None
    """Digest of the last seed taken up, kept through deletes."""

    def has(self, version: int) -> bool:
        """Whether a version of this number belongs to the name's present life."""
        return not self.deleted and self.floor <= version <= self.latest


def now() -> str:
    """RFC 3339, UTC, in milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def check_expected(head: Head | None, expected: Expected) -> None:
    """Compare before a change; raises VersionMismatch."""
    current = None if head is None or head.deleted else head.version
    if expected is None or expected == (ABSENT if current is None else current):
        return
    stands = "does not exist" if current is None else f"is at version {current}"
    raise VersionMismatch(f"The prompt {stands}, which is not what was expected; read it again and decide anew.")
