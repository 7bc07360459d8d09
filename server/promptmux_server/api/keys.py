"""Bearer keys: whose they are, and which scopes they have. Only digests are kept; all are compared in constant time.

Which route asks for which scope is `access.py`'s; what a weight does is the engine's.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

from promptmux_server.errors import Unauthorized

KeyScope = Literal["infer", "eval", "admin"]
"""Ask; run evaluations; change what is served, by training too. None includes another."""
SCOPES = frozenset(get_args(KeyScope))
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0

_LINE = re.compile(
    r"(?P<name>\S+)\s+(?P<scopes>[a-z,]+)\s+(?P<sha256>[0-9a-f]{64})(\s+weight=(?P<weight>\d{1,3}(\.\d{1,3})?))?"
)


class KeyFileError(ValueError):
    """The key file cannot be understood; the message names the line, never its content."""


@dataclass(frozen=True)
class Key:
    """What one line of the key file grants. Lines of one name, such as an old and a new key, are one caller."""

    name: str
    scopes: frozenset[str]
    weight: float = 1.0
    """The name's part of a busy device, relative to other names."""


class Keys:
    """sha256 of each key -> what it grants."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        self._keys = dict(keys)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read lines `NAME SCOPE[,SCOPE] SHA256 [weight=NUMBER]`; blank lines and # comments are skipped.

        Raises KeyFileError, also for a key given twice and for a name given two weights.
        """
        keys: dict[str, Key] = {}
        weights: dict[str, float] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError("the key file cannot be read") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            sha256, key = _parse(line, number)
            if sha256 in keys:
                raise KeyFileError(f"line {number} of the key file holds the key of an earlier line")
            if weights.setdefault(key.name, key.weight) != key.weight:
                raise KeyFileError(f"line {number} of the key file gives its name another weight than an earlier line")
            keys[sha256] = key
        if not keys:
            raise KeyFileError("the key file holds no key")
        return cls(keys)

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Key:
        """What the key that was sent grants; raises Unauthorized unless it is exactly one known key."""
        given = [value for name, value in headers if name == b"authorization"]
        found: Key | None = None
        if len(given) == 1 and given[0][:7].lower() == b"bearer ":
            digest = hashlib.sha256(given[0][7:].strip()).hexdigest()
            for known, key in self._keys.items():
                if secrets.compare_digest(digest, known):
                    found = key
        if found is None:
            raise Unauthorized("Send a key of this server as `Authorization: Bearer KEY`.")
        return found

    def weights(self) -> dict[str, float]:
        """The weight of each name."""
        return {key.name: key.weight for key in self._keys.values()}


def _parse(line: str, number: int) -> tuple[str, Key]:
    match = _LINE.fullmatch(line.strip())
    granted = frozenset(match["scopes"].split(",")) if match else frozenset[str]()
    if match is None or not granted <= SCOPES:
        raise KeyFileError(f"line {number} of the key file is not NAME SCOPE[,SCOPE] SHA256 [weight=NUMBER]")
    weight = float(match["weight"] or 1.0)
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise KeyFileError(f"line {number} of the key file: a weight is from {MIN_WEIGHT} to {MAX_WEIGHT:g}")
    return match["sha256"], Key(match["name"], granted, weight)
