"""`promptmux prompts`: what a running server has, and the files of it.

Owns the group of commands and those that only read; `prompt_changes` has those that publish and roll back,
`prompt_files` those that need no server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from promptmux_server.cli import prompt_changes, prompt_files
from promptmux_server.cli.output import DEFAULT_URL, JsonOption, UrlOption, fail, print_json
from promptmux_server.cli.prompt_refusals import connected
from promptmux_server.cli.prompt_tables import NameArgument, show_prompts, show_versions, size


def register(app: typer.Typer) -> None:
    prompts = typer.Typer(
        name="prompts",
        help="Publish prompts into a running server, fetch them, roll them back.",
        no_args_is_help=True,
        rich_markup_mode="markdown",
    )
    app.add_typer(prompts)
    prompts.command("list", epilog="Example: `promptmux prompts list --json`")(list_all)
    prompts.command(epilog="Example: `promptmux prompts versions vqa`")(versions)
    prompts.command(epilog="Example: `promptmux prompts pull vqa@7 -o vqa.safetensors`")(pull)
    prompt_changes.register(prompts)
    prompt_files.register(prompts)


def list_all(url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """List every prompt with the version that its name stands for."""
    with connected(url) as client:
        found = list(client.prompts.list())
    show_prompts(found, as_json=as_json)


def versions(name: NameArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """List the versions of a prompt that are kept, newest first."""
    with connected(url) as client:
        found = client.prompts.versions(name)
    show_versions(found, as_json=as_json)


def pull(
    prompt: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Default version: the present one.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: NAME@VERSION.safetensors.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Fetch the file of a version, checked against its digest; any server of the same backbone accepts it."""
    name, version = _parse(prompt)
    with connected(url) as client:
        version = client.prompts.get(name).version if version is None else version
        path = output or Path(f"{name}@{version}.safetensors")
        if path.exists() and not force:
            fail(f"{path} is there already: name another file with -o, or write over it with --force")
        data = client.prompts.pull(name, version)
    _write(path, data)
    if as_json:
        print_json({"name": name, "version": version, "bytes": len(data), "file": str(path)})
    else:
        typer.echo(f"{name}@{version} -> {path} ({size(len(data))}, digest checked)")


def _parse(prompt: str) -> tuple[str, int | None]:
    name, at, version = prompt.partition("@")
    if at and not (version.isdecimal() and int(version) > 0):
        fail(f"{prompt}: a version is a number from 1, as in {name}@7")
    return name, int(version) if at else None


def _write(path: Path, data: bytes) -> None:
    """Beside the place first: whoever looks at the path sees a whole file."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        fail(f"{path} cannot be written: {error.strerror}")
