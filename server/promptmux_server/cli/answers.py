"""Answers on a terminal: a table when all are there, lines that grow while they come, or JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer

from promptmux_server.cli.output import print_json, print_table

if TYPE_CHECKING:
    from promptmux import Answer, Delta


def show_answers(answers: Sequence[Answer], *, as_json: bool) -> None:
    """All of them at once."""
    if as_json:
        print_json([answer.model_dump(exclude_none=True) for answer in answers])
    else:
        print_table(("task", "answer", "score", "ms"), [_row(answer) for answer in answers])


def show_stream(events: Iterable[Delta | Answer], tasks: Sequence[str], *, as_json: bool) -> list[Answer]:
    """Each piece as it comes, and the answers in the end; JSON has one event a line.

    `tasks` are the names of the items by position, which is their id. A piece of another item begins a line of its own,
    as does an answer whose text has not been seen.
    """
    from promptmux import Delta

    answers: list[Answer] = []
    seen: set[str] = set()
    line: str | None = None
    for event in events:
        if not isinstance(event, Delta):
            answers.append(event)
        if as_json:
            typer.echo(json.dumps(event.model_dump(exclude_none=True), allow_nan=False))
            continue
        is_failure = not isinstance(event, Delta) and event.error is not None
        if not isinstance(event, Delta) and event.id in seen and not is_failure:
            continue
        if event.id != line or is_failure:
            typer.echo(("" if line is None else "\n") + f"{tasks[int(event.id)]}: ", nl=False)
        typer.echo(event.text if isinstance(event, Delta) else _said(event), nl=False)
        seen.add(event.id)
        line = event.id
    if line is not None:
        typer.echo()
    return answers


def _said(answer: Answer) -> str:
    if answer.output is None:
        return f"error: {answer.error.message if answer.error else 'no answer'}"
    return str(answer.output)


def _row(answer: Answer) -> tuple[str, str, str, str]:
    if answer.output is None:
        return answer.task, _said(answer), "", ""
    return answer.task, _said(answer), f"{answer.score:.3f}", f"{answer.timings_ms.get('total', 0.0):.0f}"
