"""A data file looked at without learning anything: what a task would make of its first samples, in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from promptmux_server.backbone.images import ImageLimits
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.tasks import TaskSpec
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.source import Source
from promptmux_server.training.data.survey import Survey, survey


@dataclass(frozen=True)
class ShownSample:
    """One sample as the model meets it: both texts are decoded from their tokens."""

    place: str
    picture: str | None
    """Its size in pixels."""
    reads: str
    writes: str
    confidence: float


@dataclass(frozen=True)
class DryRun:
    """What was found, and the first good samples."""

    survey: Survey
    first: tuple[ShownSample, ...]
    too_long: int
    """Of the first samples, those whose targets are longer than the task's answers may become."""


def dry_run(
    source: Source,
    spec: TaskSpec,
    tokenizer: Tokenizer,
    cache: Path,
    *,
    shown: int = 5,
    skip_bad: int = 0,
    pixels: bool = False,
    progress: Callable[[int], None] | None = None,
) -> DryRun:
    """Look at every line, and show the first good ones; raises DataError with the bad ones beyond `skip_bad`."""
    encoder, limits = SampleEncoder(spec, tokenizer), ImageLimits()
    found = survey(source, encoder, cache, pixels=pixels, limits=limits, progress=progress).allow(skip_bad)
    rows, first, too_long = found.rows(), [], 0
    for number in range(min(shown, len(rows))):
        sample = rows.sample(number)
        size = sample.picture.size(limits) if sample.picture else None
        example = encoder.example(sample, size=size)
        too_long += len(example.target) > spec.decoding.max_length
        first.append(
            ShownSample(
                str(source.place(int(rows.lines[number]), sample.entry)),
                f"{size[0]} x {size[1]}" if size else None,
                tokenizer.decode(example.source).strip(),
                tokenizer.decode(example.target).strip(),
                example.confidence,
            )
        )
    return DryRun(found, tuple(first), too_long)
