"""`promptmux convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from promptmux_server.cli.output import JsonOption, fail, print_json, print_table


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `promptmux convert OFA-base/ backbones/ofa-base`")(convert)


def convert(
    source: Annotated[Path, typer.Argument(help="A transformers-format directory, or a fairseq .pt file.")],
    destination: Annotated[Path, typer.Argument(help="The backbone directory to write.")],
    as_json: JsonOption = False,
) -> None:
    """Convert a backbone to our directory format, offline, without running code from the file.

    Prompts that a fairseq checkpoint carries become prompt files below the destination.
    """
    from promptmux_server.backbone import weights
    from promptmux_server.errors import PromptmuxError

    try:
        report = weights.convert(source, destination)
    except PromptmuxError as error:
        fail(error.message)
    prompts = [str(path) for path in report.prompts]
    if as_json:
        print_json(
            {
                "fingerprint": report.fingerprint,
                "tensors": report.tensors,
                "dropped": list(report.dropped),
                "has_tokenizer": report.has_tokenizer,
                "prompts": prompts,
            }
        )
        return
    rows = [
        ("fingerprint", report.fingerprint),
        ("tensors", str(report.tensors)),
        ("left out", f"{len(report.dropped)} that text generation does not need"),
        ("tokenizer", "copied" if report.has_tokenizer else "none found: add vocab.json and merges.txt to serve it"),
        *(("prompt", path) for path in prompts),
    ]
    print_table(("", str(destination)), rows)
