"""`promptmux data check`: what a task would make of a data file, before anything is learned from it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.console import Console
from rich.progress import Progress

from promptmux_server.cli.output import JsonOption, fail, print_json, print_table

if TYPE_CHECKING:
    from promptmux_prompts import Kind, Manifest
    from promptmux_server.backbone.weights import LoadedBackbone
    from promptmux_server.training.data.dry_run import DryRun
    from promptmux_server.training.data.source import Format, Source

MOST_LABELS = 256


def register(app: typer.Typer) -> None:
    data = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    data.callback()(_keep_the_name)
    data.command(epilog="Example: `promptmux data check pets.jsonl --task answer --images pets/`")(check)
    app.add_typer(data, name="data", help="Look at training data.")


def _keep_the_name() -> None:
    """Look at training data."""  # a callback makes `check` a command of its own even while it is the only one


def check(
    file: Annotated[Path, typer.Argument(help="A .jsonl, .tsv (OFA) or .json (COCO-style) file.")],
    task: Annotated[str, typer.Option(help="Kind of the task: caption, answer, label, box or text.")],
    images: Annotated[Path | None, typer.Option(help="Folder of pictures; default: the file's own.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="The second document of VQA.")] = None,
    split: Annotated[str | None, typer.Option(help="Splits to read, where entries name theirs.")] = None,
    image_name: Annotated[str | None, typer.Option(help="Pictures' names by id: `COCO_train2014_%012d.jpg`.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="tsv, jsonl or coco; default: by suffix.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="What the encoder reads, with {text} and {premise}; default: OFA's.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="File of a closed answer set, one a line; default for labels: those found.")
    ] = None,
    no_image: Annotated[bool, typer.Option("--no-image", help="The task takes no picture.")] = False,
    backbone: Annotated[str, typer.Option(help="Backbone directory, or `pocket`.")] = "pocket",
    show: Annotated[int, typer.Option(help="Samples to show.", min=0)] = 5,
    pictures: Annotated[bool, typer.Option("--pictures", help="Decode every picture, not its header alone.")] = False,
    skip_bad: Annotated[int, typer.Option(help="Lines that may be left out.", min=0)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Read a whole data file; refuse it with the lines that are wrong, or show what a task makes of its first ones."""
    from promptmux_prompts import InvalidPromptFile, Kind
    from promptmux_server.backbone.weights import load_backbone
    from promptmux_server.errors import PromptmuxError
    from promptmux_server.pocket import WEIGHTS
    from promptmux_server.tasks import TaskSpec
    from promptmux_server.training.data.dry_run import dry_run
    from promptmux_server.training.data.source import SourceConfig, open_source

    if task not in get_args(Kind):
        fail(f"--task must be one of {', '.join(get_args(Kind))}")
    kind, form = cast("Kind", task), cast("Format | None", format_)
    config = SourceConfig(
        path=file, format=form, images=images, annotations=annotations, split=split, image_name=image_name
    )
    premise = instruction is not None and "{premise}" in instruction
    try:
        loaded = load_backbone(WEIGHTS if backbone == "pocket" else Path(backbone))
        with tempfile.TemporaryDirectory(prefix="promptmux-") as cache:
            source = open_source(config, kind, Path(cache), premise=premise)
            manifest = _manifest(kind, source, loaded, instruction, answers, takes_image=not no_image)
            spec = TaskSpec.from_manifest(manifest, loaded.config)
            with _progress(len(source)) as progress:
                found = dry_run(
                    source,
                    spec,
                    loaded.tokenizer(),
                    Path(cache),
                    shown=show,
                    skip_bad=skip_bad,
                    pixels=pictures,
                    progress=progress,
                )
            _print(found, as_json=as_json)
    except PromptmuxError as error:
        fail(error.message)
    except InvalidPromptFile as error:
        fail(f"there can be no such task: {error}")


def _manifest(
    kind: Kind,
    source: Source,
    backbone: LoadedBackbone,
    instruction: str | None,
    answers: Path | None,
    *,
    takes_image: bool,
) -> Manifest:
    """The task as it is described on the command line; labels that are not named are those of the data."""
    from promptmux_server.training.data.manifests import bare_manifest, labels_for
    from promptmux_server.training.data.source import distinct_targets

    closed = None if answers is None else _lines_of(answers)
    labels = None
    if kind == "label":
        labels, closed = labels_for(closed or distinct_targets(source, MOST_LABELS)), None
    return bare_manifest(
        "checked", kind, backbone, instruction=instruction, answers=closed, labels=labels, takes_image=takes_image
    )


@contextmanager
def _progress(lines: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("lines", total=lines)
        yield lambda done: bar.update(task, completed=done)


def _lines_of(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        fail(f"{path.name} cannot be read as UTF-8 text")


def _print(found: DryRun, *, as_json: bool) -> None:
    survey = found.survey
    if as_json:
        print_json(
            {
                "samples": len(survey.found),
                "skipped": survey.bad_count,
                "bad": [str(line) for line in survey.bad],
                "first": [dataclasses.asdict(sample) for sample in found.first],
                "too_long": found.too_long,
                "sha256": survey.source.sha256,
            }
        )
        return
    rows = [(s.place, s.picture or "", s.reads, s.writes, f"{s.confidence:g}") for s in found.first]
    print_table(("place", "picture", "the model reads", "and should write", "confidence"), rows)
    typer.echo(f"{len(survey.found)} samples can be learned from.")
    for line in survey.bad:
        typer.echo(f"left out: {line}")
    if found.too_long:
        typer.echo(f"{found.too_long} of those shown are longer than the task's decoding.max_length lets it answer.")
