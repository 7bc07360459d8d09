"""`promptmux predict` and `promptmux tasks`: the client on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promptmux_server.cli.output import DEFAULT_URL, JsonOption, UrlOption, fail, print_json, print_table

if TYPE_CHECKING:
    from promptmux import Answer


def register(app: typer.Typer) -> None:
    example = (
        'Example: `promptmux predict --task scene-vqa --image examples/scene-01.png --text "how many dogs are there?"`'
    )
    app.command(epilog=example)(predict)
    app.command(epilog="Example: `promptmux tasks --json`")(tasks)


def predict(
    task: Annotated[list[str], typer.Option(help="Task to ask; may be repeated: all are answered in one batch.")],
    image: Annotated[Path | None, typer.Option(help="A JPEG, PNG or WebP file.", exists=True, dir_okay=False)] = None,
    text: Annotated[str | None, typer.Option(help="The question, hypothesis or expression.")] = None,
    premise: Annotated[str | None, typer.Option(help="For tasks whose instruction has a premise.")] = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Ask a running server."""
    from promptmux import Client, Item, PromptmuxError

    items = [Item(task=name, image=image, text=text, premise=premise) for name in task]
    try:
        with Client(url) as client:
            answers = client.predict_many(items)
    except PromptmuxError as error:
        fail(str(error))
    if as_json:
        print_json([answer.model_dump(exclude_none=True) for answer in answers])
    else:
        print_table(("task", "answer", "score", "ms"), [_row(answer) for answer in answers])
    if any(answer.error for answer in answers):
        raise typer.Exit(1)


def _row(answer: Answer) -> tuple[str, str, str, str]:
    if answer.output is None:
        return answer.task, f"error: {answer.error.message if answer.error else 'no answer'}", "", ""
    return answer.task, str(answer.output), f"{answer.score:.3f}", f"{answer.timings_ms.get('total', 0.0):.0f}"


def tasks(url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """List what a running server serves, and what it refused."""
    from promptmux import Client, PromptmuxError

    try:
        with Client(url) as client:
            found = client.tasks()
    except PromptmuxError as error:
        fail(str(error))
    if as_json:
        print_json([task.model_dump() for task in found])
        return
    rows = [
        (
            task.name,
            task.kind or "",
            task.state if task.error is None else f"refused: {task.error.code}",
            f"{task.tier or ''}{', pinned' if task.pinned else ''}",
            f"{task.encoder_length}+{task.decoder_length}",
            "" if task.metric is None else f"{task.metric.get('name')} {task.metric.get('value')}",
            (task.sha256 or "")[:12],
        )
        for task in found
    ]
    print_table(("task", "kind", "state", "place", "length", "score", "sha256"), rows)
