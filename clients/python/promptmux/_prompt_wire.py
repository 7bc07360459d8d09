"""Calls about prompts, and how their answers are read: what both clients share. Nothing here sends anything."""

from __future__ import annotations

import hashlib
import re

import httpx2
from pydantic import ValidationError

from promptmux._errors import CorruptDownload
from promptmux._prompt_models import PromptVersion
from promptmux._upload import Upload
from promptmux._wire import Call, not_understood, read_object, read_page

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
PAGE = 500
"""Prompts asked for at a time."""


def push_call(name: str, upload: Upload, *, if_version: int | None, create_only: bool) -> Call:
    """Raises ValueError for two conditions at once."""
    if create_only and if_version is not None:
        raise ValueError("a prompt that must not exist has no version: give if_version or create_only, not both")
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(len(upload.data)),
        "X-Content-SHA256": upload.sha256,
        **({"If-None-Match": "*"} if create_only else _condition(if_version)),
    }
    return Call("PUT", _path(name), upload=upload, headers=headers)


def file_call(name: str, version: int) -> Call:
    return Call("GET", _path(name, f"versions/{version}/file"))


def list_call(after: str | None) -> Call:
    return Call("GET", "/v1/prompts", params={"limit": PAGE} | ({} if after is None else {"after": after}))


def get_call(name: str) -> Call:
    return Call("GET", _path(name))


def versions_call(name: str) -> Call:
    return Call("GET", _path(name, "versions"))


def rollback_call(name: str, *, to: int | None, if_version: int | None) -> Call:
    body = {} if to is None else {"version": to}
    return Call("POST", _path(name, "rollback"), body, headers=_condition(if_version), repeatable=False)


def pin_call(name: str, *, pinned: bool) -> Call:
    return Call("POST", _path(name, "pin" if pinned else "unpin"))


def delete_call(name: str, *, if_version: int | None) -> Call:
    return Call("DELETE", _path(name), headers=_condition(if_version), repeatable=False)


def read_version(response: httpx2.Response) -> PromptVersion:
    raw = read_object(response)
    try:
        return PromptVersion.model_validate(raw)
    except ValidationError as error:
        raise not_understood(response) from error


def read_versions(response: httpx2.Response) -> list[PromptVersion]:
    return read_page(response, "versions", PromptVersion)[0]


def read_prompts(response: httpx2.Response) -> tuple[list[PromptVersion], str | None]:
    """One page, and the name after which the next one begins; None = there is no other."""
    return read_page(response, "prompts", PromptVersion)


def read_file(response: httpx2.Response) -> bytes:
    """Raises CorruptDownload unless the bytes have the sha256 that the server says they have."""
    data = response.content
    if hashlib.sha256(data).hexdigest() != response.headers.get("x-content-sha256"):
        raise CorruptDownload("The file that came does not have the sha256 announced with it; ask for it again.")
    return data


def _path(name: str, rest: str = "") -> str:
    """Raises ValueError for what cannot be a prompt's name, and in a path might mean something else."""
    if not NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            "a prompt's name is 1 to 64 of a-z, 0-9, '.', '_' and '-', begins with a letter or digit, no '..'"
        )
    return f"/v1/prompts/{name}" + (f"/{rest}" if rest else "")


def _condition(if_version: int | None) -> dict[str, str]:
    return {} if if_version is None else {"If-Match": f'"{if_version}"'}
