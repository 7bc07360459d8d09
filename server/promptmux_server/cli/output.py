"""How commands speak: tables for people, JSON for programs, and errors that end with status 1."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table

Item = TypeVar("Item")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
UrlOption = Annotated[str, typer.Option("--url", help="The server's address.", envvar="PROMPTMUX_URL")]
DEFAULT_URL = "http://127.0.0.1:8000"
WIDE = 240
"""Columns of a table that no terminal shows."""


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Cells are shown as they are: what a file or a server says can neither style a table nor steer a terminal."""
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(_printable, row))
    # A file or a pipe has no width of its own, and the 80 columns taken in its place would break every line.
    Console(width=None if sys.stdout.isatty() else WIDE, markup=False, emoji=False).print(table)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


@contextmanager
def transfer_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what is to be told of bytes sent and bytes in all; a terminal shows it, on standard error."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    # What is over is not worth a line: the command's own last words say how it ended.
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"{label}: sending", total=None)

        def tell(sent: int, total: int) -> None:
            doing = "sending" if sent < total else "sent, and checked there"
            bar.update(task, completed=sent, total=total, description=f"{label}: {doing}")

        yield tell


def counted(items: Iterable[Item], label: str) -> Iterable[Item]:
    """The items; a terminal shows how many have come, on standard error."""
    from rich.progress import Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        yield from bar.track(items, description=label)


def fail(message: str) -> NoReturn:
    """Say what went wrong on standard error and end with status 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
