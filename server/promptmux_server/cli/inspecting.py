"""A prompt file looked at: what it says of itself, how large its numbers are, which prompts are like it.

Owns the collecting and the two ways to show it, tables and JSON. Knows nothing of options or servers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import typer

from promptmux_prompts import Prompt, PromptFileError, Refusal
from promptmux_prompts.describe import Description, SideDescription, describe
from promptmux_prompts.similarity import Nearest, nearest
from promptmux_prompts.unfitted import load_unfitted, read_unfitted, scan_unfitted
from promptmux_server.cli.output import counted, fail, print_table
from promptmux_server.cli.prompt_refusals import connected


@dataclass(frozen=True)
class Inspection:
    """Of one file."""

    description: Description
    file_bytes: int
    file_sha256: str
    nearest: Nearest | None
    """None: compared with nothing."""
    unreadable: list[str] = field(default_factory=list)
    """Stems of files that should have been compared."""


def inspect_file(path: Path, others: Iterable[Prompt | Refusal] | None) -> Inspection:
    """Raises PromptFileError or OSError if the file itself cannot be read."""
    prompt = load_unfitted(path)
    data = path.read_bytes()
    unreadable: list[str] = []
    found = None if others is None else nearest(prompt, _readable(others, unreadable))
    return Inspection(describe(prompt), len(data), hashlib.sha256(data).hexdigest(), found, unreadable)


def others_at(place: str) -> Iterable[Prompt | Refusal]:
    """The prompts of a directory, or of a server, one at a time; a terminal shows how many have come."""
    if place.startswith(("http://", "https://")):
        return counted(_served_at(place), "comparing")
    if not Path(place).is_dir():
        fail("--against takes a directory of prompt files, or a server's address, such as http://127.0.0.1:8000")
    return counted(scan_unfitted(Path(place)), "comparing")


def _served_at(url: str) -> Iterator[Prompt | Refusal]:
    """Names that are deleted meanwhile are passed over."""
    from promptmux import NotFound

    with connected(url) as client:
        for version in client.prompts.list():
            with suppress(NotFound):
                data = client.prompts.pull(version.name, version.version)
                try:
                    yield read_unfitted(data)
                except PromptFileError as error:
                    yield Refusal(version.name, error.code, str(error))


def _readable(entries: Iterable[Prompt | Refusal], unreadable: list[str]) -> Iterator[Prompt]:
    for entry in entries:
        if isinstance(entry, Prompt):
            yield entry
        else:
            unreadable.append(entry.name)


def as_document(inspection: Inspection) -> dict[str, Any]:
    """For programs."""
    description = inspection.description
    document = {
        "name": description.manifest.name,
        "sha256": description.sha256,
        "file_sha256": inspection.file_sha256,
        "bytes": inspection.file_bytes,
        "dtype": description.dtype,
        "manifest": json.loads(description.manifest.to_json()),
        "encoder": description.encoder and asdict(description.encoder),
        "decoder": description.decoder and asdict(description.decoder),
    }
    if inspection.nearest is not None:
        document |= {**asdict(inspection.nearest), "unreadable": inspection.unreadable}
        document["nearest"] = document.pop("neighbours")
    return document


def show(inspection: Inspection) -> None:
    """For people."""
    description = inspection.description
    print_table(("", description.manifest.name), [*_manifest_rows(description), *_file_rows(inspection)])
    typer.echo()
    print_table(("layer", "encoder key", "value", "decoder key", "value"), _norm_rows(description))
    if inspection.nearest is not None:
        typer.echo()
        _show_nearest(inspection.nearest, inspection.unreadable)


def _manifest_rows(description: Description) -> list[tuple[str, str]]:
    """What is not said is left out."""
    manifest = description.manifest
    image, answers, metric = manifest.image, manifest.answers, manifest.metric
    rows = [
        ("kind", manifest.kind),
        ("instruction", repr(manifest.instruction)),
        ("image", f"{image.size} px, mean {image.mean:g}, std {image.std:g}" if image else ""),
        ("answers", f"{len(answers)}: {_first(answers, 6)}" if answers else ""),
        ("decoder input", manifest.decoder_input),
        ("decoding", _pairs(manifest.decoding)),
        ("metric", _pairs(metric or {})),
        ("canary", f"{len(manifest.canary)} inputs" if manifest.canary else ""),
        ("provenance", _pairs(manifest.provenance)),
        ("backbone", f"{manifest.backbone_name}, fingerprint {manifest.fingerprint[:12]}"),
    ]
    return [(name, text) for name, text in rows if text]


def _file_rows(inspection: Inspection) -> list[tuple[str, str]]:
    description = inspection.description
    manifest = description.manifest
    return [
        ("encoder", _side(description.encoder, manifest.encoder_layers)),
        ("decoder", _side(description.decoder, manifest.decoder_layers)),
        ("sha256", description.sha256),
        ("file", f"{inspection.file_bytes:,} bytes of {description.dtype}, sha256 {inspection.file_sha256[:12]}"),
    ]


def _side(side: SideDescription | None, present: tuple[int, int] | None) -> str:
    if side is None:
        return "none"
    layers, heads, length, head_dim = side.shape
    some = "" if present is None else f"layers {present[0]} to {present[1] - 1} of "
    return f"{length} positions in {some}{layers} layers of {heads} heads of {head_dim}, {side.bytes:,} bytes"


def _norm_rows(description: Description) -> list[tuple[str, ...]]:
    """Mean norms; a side that is absent, or not in a layer, leaves its cells empty."""
    manifest = description.manifest
    columns = [
        [f"{norm:.3f}" if _is_in(layer, present) else "" for layer, norm in enumerate(norms)]
        for side, present in (
            (description.encoder, manifest.encoder_layers),
            (description.decoder, manifest.decoder_layers),
        )
        for norms in ((side.key_norms, side.value_norms) if side else ((), ()))
    ]
    layers = max(map(len, columns))
    return [
        (str(layer), *(column[layer] if layer < len(column) else "" for column in columns)) for layer in range(layers)
    ]


def _is_in(layer: int, present: tuple[int, int] | None) -> bool:
    return present is None or present[0] <= layer < present[1]


def _show_nearest(found: Nearest, unreadable: list[str]) -> None:
    rows = [(n.name, f"{n.cosine:.4f}", n.sha256[:12]) for n in found.neighbours]
    print_table((f"nearest of {found.compared}", "cosine", "sha256"), rows)
    if found.incomparable:
        typer.echo(f" not compared: {found.incomparable} of another backbone, or without a side in common")
    if unreadable:
        typer.echo(f" not readable: {_first(unreadable, 9)}")


def _first(texts: Sequence[str], count: int) -> str:
    return ", ".join(texts[:count]) + (", ..." if len(texts) > count else "")


def _pairs(values: Mapping[str, Any]) -> str:
    texts = ((key, _pairs(value) if isinstance(value, Mapping) else str(value)) for key, value in values.items())
    return ", ".join(f"{key} {text}" for key, text in texts)
