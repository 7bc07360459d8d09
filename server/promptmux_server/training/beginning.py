"""What a job's prompt is before its first step, as its configuration asks, and what the manifest will tell of it.

Owns which prompts count and what is said about those that do not. How near they are is `nearest`'s business, what
becomes of their tables `initial`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from promptmux_prompts import Prompt, Refusal
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.initial import FROM_NOISE, Begin, begin_of_prompts, begin_of_texts
from promptmux_server.training.job_config import PROMPT_FILE, JobConfig
from promptmux_server.training.nearest import PROBES, nearest
from promptmux_server.training.published import Found, OpenPublished, Published, read_file
from promptmux_server.training.recipe import StepRecipe
from promptmux_server.training.run import Run
from promptmux_server.training.validation import OpenBackbone

log = logging.getLogger(__name__)

StartRun = Callable[[str, Begin, StepRecipe], Run]
"""A run of the job's task under a name, on whole batches of its data from their beginning."""


@dataclass(frozen=True)
class Beginning:
    """Tables to begin with, and where they are from, as a JSON value."""

    tables: Begin
    told: Any


def beginning(config: JobConfig, backbone: OpenBackbone, published: OpenPublished, start: StartRun) -> Beginning:
    """Find what `[begin]` asks for. Raises TrainingConfigError, and for probes what the task's data raise."""
    begin = config.begin
    if begin.text is not None:
        told = begin.text[0] if len(begin.text) == 1 else list(begin.text)
        return Beginning(begin_of_texts(backbone.model, texts_read(config, backbone)), told)
    if begin.prompt is not None:
        return _mean(config, [(_named(config, backbone, published), None)])
    if begin.nearest is not None:
        return _nearest(config, published(str(begin.among), backbone.loaded), start)
    return Beginning(FROM_NOISE, "noise")


def texts_read(config: JobConfig, backbone: OpenBackbone) -> list[tuple[int, ...]]:
    """The texts of `[begin]` as tokens, if it has any; raises TrainingConfigError for one that cannot be read whole."""
    sources = [(BOS, *backbone.tokenizer.encode(text), EOS) for text in config.begin.text or ()]
    most = backbone.loaded.config.max_positions
    for source in sources:
        if len(source) > most:
            raise TrainingConfigError(
                f"begin.text: a text has {len(source)} tokens, begin and end included, and may have {most}, which the "
                "backbone reads: shorten it, or give a list of shorter texts."
            )
    return sources


def _named(config: JobConfig, backbone: OpenBackbone, published: OpenPublished) -> Found:
    name, among = str(config.begin.prompt), config.begin.among
    if name.endswith(PROMPT_FILE):
        found = read_file(Path(name), backbone.loaded)
    else:
        found = published(str(among), backbone.loaded).read(name)
    if isinstance(found, Refusal):
        raise TrainingConfigError(f"begin.prompt: {found.name} cannot be begun from: {found.message}.")
    return found


def _nearest(config: JobConfig, published: Published, start: StartRun) -> Beginning:
    names: dict[str, str] = {}
    recipe = replace(config.steps, steps=PROBES, warmup=0.0, drop_worst=0.0, average_decay=None)

    def candidates() -> Iterator[Prompt]:
        for name in published.names():
            found = published.read(name)
            if isinstance(found, Refusal):
                log.warning("%s is left out as a beginning: %s.", name, found.message)
            else:
                names.setdefault(found.prompt.digest, name)
                yield found.prompt

    def probe(prompt: Prompt) -> Run:
        return start(prompt.digest, _tables(config, [prompt]), recipe)

    near = nearest(candidates(), config.begin.nearest or 1, probe, config.compute)
    if not near:
        raise TrainingConfigError("begin.among: no prompt there can be begun from: it needs one of this backbone.")
    return _mean(config, [(Found(names[each.prompt.digest], each.prompt), each.distance) for each in near])


def _mean(config: JobConfig, chosen: Sequence[tuple[Found, float | None]]) -> Beginning:
    """Of prompts with their distances, where those are known."""
    told = [
        {"name": found.name, "sha256": found.prompt.digest, "weight": 1 / len(chosen)}
        | ({} if distance is None else {"distance": distance})
        for found, distance in chosen
    ]
    return Beginning(_tables(config, [found.prompt for found, _ in chosen]), told)


def _tables(config: JobConfig, prompts: Sequence[Prompt]) -> Begin:
    return begin_of_prompts(prompts, config.prompt.encoder_length, config.prompt.decoder_length)
