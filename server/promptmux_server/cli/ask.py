"""`promptmux predict`, `fanout` and `tasks`: the client on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promptmux_server.cli.answers import show_answers, show_stream
from promptmux_server.cli.output import DEFAULT_URL, JsonOption, UrlOption, fail, print_json, print_table

if TYPE_CHECKING:
    from promptmux import Task


ImageOption = Annotated[Path | None, typer.Option(help="A JPEG, PNG or WebP file.", exists=True, dir_okay=False)]
TextOption = Annotated[str | None, typer.Option(help="The question, hypothesis or expression.")]
PremiseOption = Annotated[str | None, typer.Option(help="For tasks whose instruction has a premise.")]


def register(app: typer.Typer) -> None:
    example = (
        'Example: `promptmux predict --task scene-vqa --image examples/scene-01.png --text "how many dogs are there?"`'
    )
    app.command(epilog=example)(predict)
    app.command(epilog='Example: `promptmux fanout examples/scene-01.png --text "the dog"`')(fanout)
    app.command(epilog="Example: `promptmux tasks --json`")(tasks)


def predict(
    task: Annotated[list[str], typer.Option(help="Task to ask; may be repeated: all are answered in one batch.")],
    image: ImageOption = None,
    text: TextOption = None,
    premise: PremiseOption = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print texts while they grow: token by token, so without beams.")
    ] = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Ask a running server."""
    from promptmux import Client, Item, PromptmuxError

    decoding = {"beam_size": 1} if stream else None
    items = [Item(task=name, image=image, text=text, premise=premise, decoding=decoding) for name in task]
    try:
        with Client(url) as client:
            if stream:
                answers = show_stream(client.stream_many(items), task, as_json=as_json)
            else:
                answers = client.predict_many(items)
                show_answers(answers, as_json=as_json)
    except PromptmuxError as error:
        fail(str(error))
    if any(answer.error for answer in answers):
        raise typer.Exit(1)


def fanout(
    image: Annotated[Path, typer.Argument(help="A JPEG, PNG or WebP file.", exists=True, dir_okay=False)],
    tasks: Annotated[
        str | None, typer.Option(help="Names, separated by commas; default: every task that fits what is given.")
    ] = None,
    text: TextOption = None,
    premise: PremiseOption = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Ask a running server many tasks about one picture, which is sent and decoded once."""
    from promptmux import Client, PromptmuxError

    try:
        with Client(url) as client:
            names = _that_fit(client.tasks(), text, premise) if tasks is None else tasks.split(",")
            answers = client.fanout(image, names, text=text, premise=premise) if names else []
    except PromptmuxError as error:
        fail(str(error))
    if not names:
        fail("no task fits: see `promptmux tasks`, and give a --text where tasks need one")
    show_answers(answers, as_json=as_json)
    if any(answer.error for answer in answers):
        raise typer.Exit(1)


def _that_fit(known: Sequence[Task], text: str | None, premise: str | None) -> list[str]:
    """Served tasks that look at pictures and lack nothing."""
    return [
        task.name
        for task in known
        if task.state == "ready"
        and task.takes_image
        and (text is not None or not task.takes_text)
        and (premise is not None or not task.takes_premise)
    ]


def tasks(url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """List what a running server serves, and what it refused."""
    from promptmux import Client, PromptmuxError

    try:
        with Client(url) as client:
            found = client.tasks()
    except PromptmuxError as error:
        fail(str(error))
    if as_json:
        print_json([task.model_dump(mode="json") for task in found])
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
