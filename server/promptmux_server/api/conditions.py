"""What a request says outside its body: name, digest, condition, page, key. Checked here, before any work.

Owns their forms. What a condition means for a change is the store's.
"""

from __future__ import annotations

import re

from starlette.requests import Request

from promptmux_prompts import ABSENT, Expected
from promptmux_prompts.records import is_name
from promptmux_server.errors import InvalidParameter, VersionNotFound

DEFAULT_PAGE, LARGEST_PAGE = 100, 1000
LONGEST_AFTER = 255
"""Longer than a name: it may be that of a refused file."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ETAG = re.compile(r'"([0-9]{1,9})"')
_NUMBER = re.compile(r"[0-9]{1,9}")
_KEY = re.compile(r"[!-~]{1,255}")


def new_name(name: str) -> str:
    """A name that a prompt may be given."""
    if not is_name(name):
        raise InvalidParameter(
            "A name has 1 to 64 of a-z, 0-9, '.', '_' and '-', begins with a letter or digit, and has no '..'.",
            param="name",
        )
    return name


def version_number(text: str) -> int:
    """A version in a path; anything else is a version that there is not."""
    if not _NUMBER.fullmatch(text):
        raise VersionNotFound("A version is a whole number; list the versions to see those that are kept.")
    return int(text)


def announced_sha256(request: Request) -> str:
    """What the bytes of the body must hash to."""
    given = request.headers.getlist("x-content-sha256")
    if len(given) != 1 or not _SHA256.fullmatch(given[0]):
        raise InvalidParameter(
            "Send the file's sha256 as X-Content-SHA256: 64 lower-case hexadecimal digits.", param="X-Content-SHA256"
        )
    return given[0]


def expected_version(request: Request) -> Expected:
    """`If-Match: "7"`, `If-None-Match: *`, or neither."""
    match, none_match = request.headers.getlist("if-match"), request.headers.getlist("if-none-match")
    if len(match) + len(none_match) > 1:
        raise InvalidParameter("Send one of If-Match and If-None-Match.", param="If-Match")
    if none_match:
        if none_match[0].strip() != "*":
            raise InvalidParameter("If-None-Match can only be *: the name must not exist yet.", param="If-None-Match")
        return ABSENT
    if not match:
        return None
    etag = _ETAG.fullmatch(match[0].strip())
    if etag is None:
        raise InvalidParameter('If-Match is one version in quotes, such as "7".', param="If-Match")
    return int(etag[1])


def idempotency_key(request: Request) -> str | None:
    """`Idempotency-Key`, by which a call that is sent again is known."""
    given = request.headers.getlist("idempotency-key")
    if len(given) > 1 or not all(_KEY.fullmatch(key) for key in given):
        raise InvalidParameter("Send one Idempotency-Key of 1 to 255 visible characters.", param="Idempotency-Key")
    return given[0] if given else None


def page(request: Request, default: int = DEFAULT_PAGE, largest: int = LARGEST_PAGE) -> tuple[str, int]:
    """`after` and `limit` of a listing."""
    after, limit = request.query_params.get("after", ""), request.query_params.get("limit", str(default))
    if len(after) > LONGEST_AFTER:
        raise InvalidParameter("`after` is the name behind which the page begins.", param="after")
    if not _NUMBER.fullmatch(limit) or not 1 <= int(limit) <= largest:
        raise InvalidParameter(f"`limit` is from 1 to {largest}.", param="limit")
    return after, int(limit)
