"""Bearer keys: who may ask, who may change. Only digests are kept, and all are compared in constant time."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from promptmux_server.errors import Forbidden, Unauthorized

SCOPES = frozenset({"infer", "admin"})
_LINE = re.compile(r"(?P<name>\S+)\s+(?P<scopes>[a-z,]+)\s+(?P<sha256>[0-9a-f]{64})")


class KeyFileError(ValueError):
    """The key file cannot be understood; the message names the line, never its content."""


class Keys:
    """sha256 of each key -> its name and scopes."""

    def __init__(self, keys: Mapping[str, tuple[str, frozenset[str]]]) -> None:
        self._keys = dict(keys)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read lines `NAME SCOPE[,SCOPE] SHA256`; blank lines and # comments are skipped. Raises KeyFileError."""
        keys = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError("the key file cannot be read") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            match = _LINE.fullmatch(line.strip())
            granted = frozenset(match["scopes"].split(",")) if match else frozenset[str]()
            if match is None or not granted <= SCOPES:
                raise KeyFileError(f"line {number} of the key file is not NAME SCOPE[,SCOPE] SHA256")
            keys[match["sha256"]] = (match["name"], granted)
        if not keys:
            raise KeyFileError("the key file holds no key")
        return cls(keys)

    def check(self, headers: Iterable[tuple[bytes, bytes]], *, admin: bool) -> str:
        """Name of the key sent; raises Unauthorized unless exactly one known key was, Forbidden beyond its scope."""
        given = [value for name, value in headers if name == b"authorization"]
        found: tuple[str, frozenset[str]] | None = None
        if len(given) == 1 and given[0][:7].lower() == b"bearer ":
            digest = hashlib.sha256(given[0][7:].strip()).hexdigest()
            for known, key in self._keys.items():
                if secrets.compare_digest(digest, known):
                    found = key
        if found is None:
            raise Unauthorized("Send a key of this server as `Authorization: Bearer KEY`.")
        name, scopes = found
        if ("admin" if admin else "infer") not in scopes:
            raise Forbidden("This key's scope does not reach this route.")
        return name
