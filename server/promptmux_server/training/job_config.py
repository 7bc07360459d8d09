"""What one training job is, as written in a TOML file: nouns, defaults, bounds, and what is said about mistakes.

Owns the file's sections and where in the file a mistake stands. Opens none of the files that are named.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from promptmux_prompts import Kind
from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.data.source import SourceConfig
from promptmux_server.training.data.task_data import DataConfig
from promptmux_server.training.recipe import ComputeRecipe, PromptRecipe, StepRecipe

Count = Annotated[int, Field(ge=1)]
MOST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Keys of the manifest that the prompt will carry."""

    name: str
    kind: Kind
    instruction: str | None = None
    """What the encoder reads; None: OFA's for the kind."""
    answers: Sequence[str] | None = None
    """A closed answer set; for labels None means those found in the data."""
    takes_image: bool = True
    decoding: Mapping[str, Any] = field(default_factory=dict)
    """How the served task answers, and is scored, where it differs from the kind's defaults."""


@dataclass(frozen=True, kw_only=True)
class BeginConfig:
    """What the prompt is before the first step."""

    text: str | None = None
    """Its keys and values in the backbone; None: noise."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The rhythm of the run."""

    rows: Count = 8
    """Samples in one batch."""
    validate_every: Count | None = None
    """Steps; None: a tenth of all. The last step is always scored."""
    validation_samples: Count = 500
    """At most so many of the samples that are held out, spread evenly over them."""
    checkpoint_every: Count = 100
    """Steps; a step that was scored is kept too."""
    keep_checkpoints: Count = 2
    """The last ones; the best is kept beside them."""


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """Where the job is computed."""

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen backbone; what learns is float32."""
    threads: Count | None = None
    """Of one operation on a CPU; None: the cores that there are. Another number may round otherwise."""


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """When a trained prompt replaces the one that is served."""

    name: str | None = None
    """None: the task's."""
    margin: float = 0.0
    """By which its score must exceed that of the served one on the same samples."""


class JobConfig(BaseModel):
    """One job. Paths are as they are opened: relative ones start at the file's own folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    backbone: str = "pocket"
    output: Path
    """Folder of checkpoints, curve and result."""
    cache: Path | None = None
    """Folder for indices and pictures that were seen, which jobs may share; None: within `output`."""
    task: TaskConfig
    data: DataConfig
    prompt: PromptRecipe = PromptRecipe()
    begin: BeginConfig = BeginConfig()
    steps: StepRecipe
    run: RunConfig = RunConfig()
    compute: ComputeRecipe = ComputeRecipe()
    machine: MachineConfig = MachineConfig()
    publish: PublishConfig = PublishConfig()

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.output / "cache"

    @property
    def validate_every(self) -> int:
        return self.run.validate_every or max(1, self.steps.steps // 10)


Config = TypeVar("Config", bound=JobConfig)


def read_job(path: Path) -> tuple[JobConfig, bytes]:
    """A job and the bytes that it was read from; raises TrainingConfigError."""
    text = read_text(path)
    return parse_job(text, path.name, path.resolve().parent), text.encode()


def read_text(path: Path) -> str:
    """A configuration's text; raises TrainingConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingConfigError(f"{path.name} cannot be read as UTF-8 text: check its name and kind.") from error
    if len(data) > MOST_BYTES:
        raise TrainingConfigError(f"{path.name} is too large for a configuration: data belong in files of their own.")
    return text


def parse_job(text: str, name: str, folder: Path) -> JobConfig:
    """A job from a file's text; `name` is for messages, `folder` is where relative paths start."""
    return parse_config(JobConfig, text, name, folder)


def parse_config(model: type[Config], text: str, name: str, folder: Path) -> Config:
    """A job, or a job with sections of its own, as `parse_job`."""
    try:
        document = json.dumps(tomllib.loads(text), allow_nan=False)
    except tomllib.TOMLDecodeError as error:
        raise TrainingConfigError(f"{name} is not TOML: {error}.") from error
    except (TypeError, ValueError) as error:
        raise TrainingConfigError(f"{name}: no setting is a date, a time, inf or nan.") from error
    try:
        config = model.model_validate_json(document)
    except ValidationError as error:
        _refuse(error, model, text, name)
    return _placed(config, folder)


def _placed(config: Config, folder: Path) -> Config:
    """The job with its relative paths put behind a folder."""

    def source(given: SourceConfig) -> SourceConfig:
        images, annotations = given.images, given.annotations
        return replace(
            given,
            path=folder / given.path,
            images=None if images is None else folder / images,
            annotations=None if annotations is None else folder / annotations,
        )

    data, validation = config.data, config.data.validation
    placed = replace(
        data, train=[source(each) for each in data.train], validation=None if validation is None else source(validation)
    )
    backbone = config.backbone if config.backbone == "pocket" else str(folder / config.backbone)
    cache = None if config.cache is None else folder / config.cache
    changes = {"backbone": backbone, "output": folder / config.output, "cache": cache, "data": placed}
    return config.model_copy(update=changes)


def _refuse(error: ValidationError, model: type[BaseModel], text: str, name: str) -> NoReturn:
    """Say all mistakes at once, each with its line."""
    said = []
    for mistake in error.errors():
        place = [str(part) for part in mistake["loc"] if not isinstance(part, int)]
        match mistake["type"]:
            case "extra_forbidden" | "unexpected_keyword_argument":
                reason = no_such_field(place[-1], _fields_of(model, place[:-1]))
            case "missing":
                reason = "is missing"
            case "value_error":
                reason = str(mistake["ctx"]["error"])
            case _:
                reason = mistake["msg"][:1].lower() + mistake["msg"][1:]
        said.append(at_line(text, name, place, reason))
    raise TrainingConfigError("\n".join(said)) from error


def no_such_field(field: str, known: Sequence[str]) -> str:
    """What is said of a name that stands where it may not."""
    near = difflib.get_close_matches(field, known, 1)
    meant = f"; did you mean `{near[0]}`?" if near else ""
    return f"there is no such field here{meant} Allowed are {', '.join(known)}"


def at_line(text: str, name: str, place: Sequence[str], reason: str) -> str:
    """What is wrong at a place of a file, with its line."""
    line = _line_of(text, place)
    where = f"{name}, line {line}" if line else name
    return f"{where}: {'.'.join(place)}: {reason}."


def _fields_of(model: type[BaseModel], place: Sequence[str]) -> list[str]:
    """Names that may stand in a section."""
    if not place:
        return list(model.model_fields)
    owner = SourceConfig if len(place) > 1 else model.model_fields[place[0]].annotation
    assert is_dataclass(owner)
    return [each.name for each in fields(owner)]


def _line_of(text: str, place: Sequence[str]) -> int | None:
    """The line (from 1) where a field stands, or else its section begins; None if neither is written out plainly."""
    section: list[str] = []
    nearest = None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([\w.-]+)\s*\]", line):
            section = header[1].split(".")
            if section == place[: len(section)]:
                nearest = number
        elif (key := re.match(r"\s*([\w.-]+)\s*=", line)) and [*section, *key[1].split(".")] == list(place):
            return number
    return nearest
