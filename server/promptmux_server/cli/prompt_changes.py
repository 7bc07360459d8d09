"""`promptmux prompts push`, `rollback`, `pin`, `unpin`, `delete`: what a running server serves is changed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promptmux_server.cli.output import DEFAULT_URL, JsonOption, UrlOption, fail, print_json, transfer_bar
from promptmux_server.cli.prompt_refusals import connected
from promptmux_server.cli.prompt_tables import NameArgument, print_version, summary

if TYPE_CHECKING:
    from promptmux import PromptVersion

IfVersionOption = Annotated[
    int | None, typer.Option("--if-version", help="Only if the prompt is at this version: else nothing happens.")
]


def register(prompts: typer.Typer) -> None:
    prompts.command(epilog="Example: `promptmux prompts push vqa.safetensors --name vqa --if-version 6`")(push)
    prompts.command(epilog="Example: `promptmux prompts rollback vqa --to 6`")(rollback)
    prompts.command(epilog="Example: `promptmux prompts pin vqa`")(pin)
    prompts.command(epilog="Example: `promptmux prompts unpin vqa`")(unpin)
    prompts.command(epilog="Example: `promptmux prompts delete vqa --yes`")(delete)


def push(
    file: Annotated[Path, typer.Argument(help="A prompt file.", exists=True, dir_okay=False)],
    name: Annotated[str | None, typer.Option(help="Publish under this name; default: the one in the file.")] = None,
    if_version: IfVersionOption = None,
    new: Annotated[bool, typer.Option("--new", help="Only if the name does not exist yet.")] = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Publish a prompt file as the next version of its name: once the command ends, requests get it.

    A file that the server refuses changes nothing: the version before goes on serving.
    """
    name = _name_in(file) if name is None else name
    with connected(url, name) as client, transfer_bar(name) as progress:
        pushed = client.prompts.push(name, file, if_version=if_version, create_only=new, progress=progress)
    _show(pushed, f"{pushed} is served now", as_json=as_json)


def rollback(
    name: NameArgument,
    to: Annotated[int | None, typer.Option("--to", help="Default: the newest kept version below the present.")] = None,
    if_version: IfVersionOption = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Let a name stand for an earlier version again."""
    with connected(url, name) as client:
        back = client.prompts.rollback(name, to, if_version=if_version)
    _show(back, f"{back} is served again", as_json=as_json)


def pin(name: NameArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Keep a prompt on the device, whatever else is asked for."""
    with connected(url) as client:
        pinned = client.prompts.pin(name)
    _show(pinned, f"{name} stays on the device", as_json=as_json)


def unpin(name: NameArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Let a prompt leave the device when others need the room."""
    with connected(url) as client:
        unpinned = client.prompts.unpin(name)
    _show(unpinned, f"{name} may leave the device", as_json=as_json)


def delete(
    name: NameArgument,
    if_version: IfVersionOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Serve a prompt no longer, and forget its versions."""
    if not yes:
        if not sys.stdin.isatty():
            fail(f"nobody can be asked whether {name} may be deleted: say --yes")
        typer.confirm(f"Delete {name} with all its versions? Requests for it will fail.", abort=True)
    with connected(url, name) as client:
        client.prompts.delete(name, if_version=if_version)
    if as_json:
        print_json({"deleted": name})
    else:
        typer.echo(f"{name} is deleted")


def _show(version: PromptVersion, said: str, *, as_json: bool) -> None:
    if as_json:
        print_version(version)
    else:
        typer.echo(f"{said}: {summary(version)}")


def _name_in(file: Path) -> str:
    """The task's name in the manifest of a prompt file."""
    from promptmux_prompts import PromptFileError
    from promptmux_prompts.unfitted import load_unfitted

    try:
        return load_unfitted(file).manifest.name
    except PromptFileError as error:
        fail(f"{file} is not a prompt file: {error}")
