"""Prompts and their versions as tables and lines for people, or as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptmux_server.cli.output import print_json, print_table

if TYPE_CHECKING:
    from promptmux import PromptVersion

NameArgument = Annotated[str, typer.Argument(help="The prompt's name: what a task is called.")]


def show_prompts(found: Sequence[PromptVersion], *, as_json: bool) -> None:
    """The present version of each prompt."""
    if as_json:
        print_json([_document(version) for version in found])
        return
    columns = ("prompt", "version", "length", "size", "published (UTC)", "by", "", "sha256")
    rows = [(v.name, str(v.version), *_about(v), "pinned" if v.pinned else "", v.sha256[:12]) for v in found]
    print_table(columns, rows)


def show_versions(found: Sequence[PromptVersion], *, as_json: bool) -> None:
    """The versions of one prompt."""
    if as_json:
        print_json([_document(version) for version in found])
        return
    columns = ("version", "", "length", "size", "published (UTC)", "by", "sha256")
    print_table(columns, [(str(v.version), "served" if v.current else "", *_about(v), v.sha256[:12]) for v in found])


def print_version(version: PromptVersion) -> None:
    """One version, for programs."""
    print_json(_document(version))


def summary(version: PromptVersion) -> str:
    """What it is, in half a line."""
    return f"{length(version)} positions, {size(version.bytes)}, sha256 {version.sha256[:12]}"


def size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def length(version: PromptVersion) -> str:
    """Positions on the encoder's and on the decoder's side."""
    return f"{version.encoder_length}+{version.decoder_length}"


def _document(version: PromptVersion) -> dict[str, Any]:
    """All but the manifest, which whoever publishes has, and which may list thousands of answers."""
    return version.model_dump(mode="json", exclude={"manifest"})


def _about(version: PromptVersion) -> tuple[str, str, str, str]:
    return length(version), size(version.bytes), f"{version.created:%Y-%m-%d %H:%M:%S}", version.author
