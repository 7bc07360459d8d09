"""`promptmux prompts import` and `inspect`: what can be done with prompt files before a server has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from promptmux_server.cli.output import DEFAULT_URL, JsonOption, UrlOption, fail, print_json, print_table, transfer_bar

if TYPE_CHECKING:
    from promptmux_server.cli.importing import Imported

Kind = Literal["caption", "answer", "label", "box", "text"]


def register(prompts_app: typer.Typer) -> None:
    example = (
        "Example: `promptmux prompts import checkpoint_best.pt --backbone backbones/ofa-base --out my-prompts "
        '--name vqa --kind answer --instruction " {text}" --image-size 480`'
    )
    prompts_app.command("import", epilog=example)(import_)
    prompts_app.command(epilog="Example: `promptmux prompts inspect my-prompts/vqa.safetensors --against my-prompts`")(
        inspect
    )


def import_(
    source: Annotated[
        Path,
        typer.Argument(help="A prompt-tuned fairseq checkpoint (.pt), or a directory that PEFT saved.", exists=True),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory that gets NAME.safetensors; default: this one, unless pushed.", file_okay=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the task; default: the source's name.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="What the task answers; default: text.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help='What the encoder reads, with "{text}" and "{premise}"; default " {text}".')
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels of the picture that the task takes; default: it takes none.")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file of further manifest keys: answers, labels, decoding, metric... Options win over it.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="The backbone to serve it on: a directory, or `pocket`; default: the checkpoint's own."),
    ] = None,
    side: Annotated[
        Literal["encoder", "decoder"], typer.Option(help="Where a PEFT prefix of a one-sided model goes.")
    ] = "decoder",
    same_backbone: Annotated[
        bool, typer.Option("--same-backbone", help="A PEFT adapter's base model is the backbone, whatever its name.")
    ] = False,
    push: Annotated[bool, typer.Option("--push", help="Publish it into a running server.")] = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Make a prompt file of another program's prompt: OFA's trainer (tables and generators), or PEFT (PREFIX_TUNING).

    Nothing in the source is executed. The file is checked as a server checks it, and no file is overwritten.
    """
    from promptmux_prompts import PromptFileError
    from promptmux_prompts.errors import ImportRefused
    from promptmux_server.cli.importing import describe_import, import_prompt
    from promptmux_server.errors import PromptmuxError
    from promptmux_server.pocket import WEIGHTS

    given = {"name": name, "kind": kind, "instruction": instruction}
    task = {"name": source.resolve().stem.lower()} | _further_keys(manifest)
    task |= {key: value for key, value in given.items() if value is not None}
    if image_size is not None:
        task["image"] = {"size": image_size}
    place = None if backbone is None else WEIGHTS if backbone == "pocket" else Path(backbone)
    try:
        imported = import_prompt(source, task, backbone=place, side=side, same_backbone=same_backbone)
    except PromptmuxError as error:
        fail(error.message)
    except (ImportRefused, PromptFileError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"the source cannot be read: {error.strerror}")
    report = describe_import(imported)
    if out is not None or not push:
        report["file"] = str(_write(imported, out or Path(".")))
    if push:
        report["pushed"] = _push(imported, url)
    if as_json:
        print_json(report)
    else:
        print_table(("", "imported"), [(key, _cell(value)) for key, value in report.items() if value])


def _write(imported: Imported, out: Path) -> Path:
    path = out / f"{imported.prompt.manifest.name}.safetensors"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(imported.data)
    except FileExistsError:
        fail("a file of that name exists and is left alone; choose another --name or --out")
    except OSError as error:
        fail(f"the file cannot be written: {error.strerror}")
    return path


def _push(imported: Imported, url: str) -> str:
    """Publish it; the version that it became."""
    from promptmux_server.cli.prompt_refusals import connected

    name = imported.prompt.manifest.name
    with connected(url, name) as client, transfer_bar(name) as progress:
        return str(client.prompts.push(name, imported.data, progress=progress))


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return " ".join(value) if isinstance(value, list) else str(value)


def _further_keys(manifest: Path | None) -> dict[str, Any]:
    from promptmux_prompts import InvalidPromptFile
    from promptmux_prompts.strict_json import parse

    if manifest is None:
        return {}
    try:
        keys = parse(manifest.read_bytes(), "manifest")
    except InvalidPromptFile as error:
        fail(str(error))
    if not isinstance(keys, dict):
        fail("the manifest must be a JSON object")
    return keys


def inspect(
    file: Annotated[Path, typer.Argument(help="A prompt file.", exists=True, dir_okay=False)],
    against: Annotated[
        str | None,
        typer.Option(help="A directory of prompt files, or a server's address: show the three most alike."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a prompt file, and show its manifest, shapes and norms by layer.

    The norms are means over heads and positions of the length of a head's key or value. Likeness is the cosine of keys
    and values averaged over positions; prompts of other backbones are not compared.
    """
    from promptmux_prompts import PromptFileError
    from promptmux_server.cli.inspecting import as_document, inspect_file, others_at, show

    try:
        inspection = inspect_file(file, None if against is None else others_at(against))
    except PromptFileError as error:
        fail(f"{error} ({error.code})")
    except OSError as error:
        fail(f"the file cannot be read: {error.strerror}")
    if as_json:
        print_json(as_document(inspection))
    else:
        show(inspection)
