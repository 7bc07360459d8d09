"""A search as written in a TOML file: a training job, with what of it is searched in the section `search`.

Owns which fields may be searched, and how a trial's values become a job of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.config_mistakes import Conflict, no_such_field
from promptmux_server.training.job_config import (
    BeginConfig,
    Count,
    JobConfig,
    parse_config,
    read_text,
)
from promptmux_server.training.recipe import PromptRecipe, StepRecipe
from promptmux_server.training.search.space import Axis, Space, Value, as_in_a_section

BEGIN, NOISE = "begin", "noise"
"""The axis of how a prompt begins: as noise, or as `[begin]` says."""
FIXED = ("steps", "accumulation", "seed")
"""Of `[steps]`, what all trials have in common: their rungs are compared step by step."""
OWNERS: Mapping[str, str] = {
    **{field.name: "prompt" for field in fields(PromptRecipe)},
    **{field.name: "steps" for field in fields(StepRecipe) if field.name not in FIXED},
}
"""The section of every field that may be searched."""
BEGINNINGS = (NOISE, "text", "prompt", "nearest")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How trials are drawn, and which of them go on."""

    space: Space
    trials: Count = 24
    at_once: Count = 8
    """Trials that learn in one batch."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """At a rung, one of so many goes on."""
    rungs: Sequence[Count] | None = None
    """Steps at which trials are compared; None: the last step divided by `reduction`, twice. []: all go to the end."""
    seed: int = 1
    """Of what is drawn; every trial learns with the seed of `[steps]`."""


class SearchJobConfig(JobConfig):
    """A job whose fields are what a trial has where the space says nothing."""

    search: SearchConfig

    @property
    def rungs(self) -> tuple[int, ...]:
        """Steps before the last at which trials are compared, ascending."""
        steps, search = self.steps.steps, self.search
        if search.rungs is not None:
            return tuple(search.rungs)
        return tuple(sorted({steps // search.reduction**power for power in (1, 2)} - {0}))

    @property
    def trial_folder(self) -> Path:
        return self.output / "trials"

    def conflicts(self, written: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from super().conflicts(written)
        if self.method.name != "prompt":
            yield ["method", "name"], "only prompts are searched, which learn in one batch"
        rungs, space = self.rungs, self.search.space
        if list(rungs) != sorted(set(rungs)) or any(rung >= self.steps.steps for rung in rungs):
            yield ["search", "rungs"], "rungs must ascend, and lie below steps.steps"
        if not space:
            yield ["search", "space"], f"name at least one field to search: {', '.join([BEGIN, *OWNERS])}"
        for field, axis in space.items():
            if reason := _fault(self, field, axis):
                yield ["search", "space", field], reason


def read_search(path: Path) -> tuple[SearchJobConfig, bytes]:
    """A search and the bytes that it was read from; raises TrainingConfigError."""
    text = read_text(path)
    return parse_search(text, path.name, path.resolve().parent), text.encode()


def parse_search(text: str, name: str, folder: Path) -> SearchJobConfig:
    """A search from a file's text; `name` is for messages, `folder` is where relative paths start."""
    return parse_config(SearchJobConfig, text, name, folder)


def trial_config(config: SearchJobConfig, number: int, values: Mapping[str, Value]) -> JobConfig:
    """The job of a trial; raises TrainingConfigError for values that do not go together."""
    changes: dict[str, dict[str, Value | None]] = {}
    for field, value in values.items():
        if field == BEGIN:
            changes[BEGIN] = {each.name: None for each in fields(BeginConfig)} if value == NOISE else {}
        else:
            changes.setdefault(OWNERS[field], {})[field] = value
    # The other fields of a job are the same for all trials, so that what was opened once serves all of them.
    placed = {"output": config.trial_folder / f"{number:04d}", "cache": config.cache_folder}
    return config.model_copy(
        update={**placed, **{section: _changed(getattr(config, section), new) for section, new in changes.items()}}
    )


def _changed(section: object, changes: Mapping[str, Value | None]) -> object:
    """A section with other values, checked as if they stood in the file."""
    try:
        new = {field: as_in_a_section(value) for field, value in changes.items()}
        document = json.dumps({**asdict(section), **new})  # type: ignore[call-overload]
        return TypeAdapter(type(section)).validate_json(document, strict=True)
    except ValidationError as error:
        mistake = error.errors()[0]
        reason = str(mistake["ctx"]["error"]) if mistake["type"] == "value_error" else mistake["msg"]
        raise TrainingConfigError(f"{reason[:1].lower()}{reason[1:]}") from error


def _fault(config: SearchJobConfig, field: str, axis: Axis) -> str | None:
    """Why a field cannot be searched so."""
    if field == BEGIN:
        for value in axis.edges:
            if value not in BEGINNINGS:
                return f"a prompt may begin as {', '.join(BEGINNINGS)}"
            if value != NOISE and getattr(config.begin, str(value)) is None:
                return f"write begin.{value} too, for the trials that begin so"
        return None
    if field not in OWNERS:
        fixed = f" All trials have the same {', '.join(FIXED)}" if field in FIXED else ""
        return no_such_field(field, [BEGIN, *OWNERS]) + fixed
    for value in axis.edges:
        try:
            _changed(getattr(config, OWNERS[field]), _beside(field, value))
        except TrainingConfigError as error:
            return f"{value!r} is not allowed: {error.message}"
    return None


def _beside(field: str, value: Value) -> dict[str, Value]:
    """A value with others that allow it, if any do: a length of 0 is allowed beside one that is not."""
    lengths = {"encoder_length": 1, "decoder_length": 1} if field in ("encoder_length", "decoder_length") else {}
    return {**lengths, field: value}
