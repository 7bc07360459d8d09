"""What one training job is, as written in TOML or JSON: nouns, defaults, bounds, and what is said about mistakes.

Owns the file's sections and where in the file a mistake stands. Opens none of the files that are named.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from promptmux_prompts import Kind
from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.data.source import SourceConfig
from promptmux_server.training.data.task_data import DataConfig
from promptmux_server.training.methods.weights import WeightsMethod
from promptmux_server.training.metrics import CaptionMetric
from promptmux_server.training.recipe import ComputeRecipe, PromptRecipe, StepRecipe

Count = Annotated[int, Field(ge=1)]
MOST_BYTES = 1 << 20
MOST_TOLD, MOST_DETAILED = 20, 5
"""Mistakes that are told of at once, in words and for programs."""
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
DEEP_KEY = re.compile(r"""^[ \t]*(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){9}""", re.MULTILINE)
"""A name of more parts than any setting has. The time that the parser takes grows with the square of their number:
16,000 took it 2.4 s."""


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
class MethodConfig:
    """What learns: deep prompts, or as a baseline to compare them with, weights of the backbone."""

    name: Literal["prompt", WeightsMethod] = "prompt"
    width: Count | None = None
    """Of an adapter's bottleneck; None: 100, as released."""


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
    metric: CaptionMetric | None = None
    """Of a caption task; None: cider, or word_f1 where all pictures have the same references."""
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
    method: MethodConfig = MethodConfig()
    prompt: PromptRecipe = PromptRecipe()
    begin: BeginConfig = BeginConfig()
    steps: StepRecipe
    run: RunConfig = RunConfig()
    compute: ComputeRecipe = ComputeRecipe()
    machine: MachineConfig = MachineConfig()
    publish: PublishConfig = PublishConfig()

    @property
    def asks_to_be_published(self) -> bool:
        """Whether the section `[publish]` is there, be it empty."""
        return "publish" in self.model_fields_set

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.output / "cache"

    @property
    def validate_every(self) -> int:
        return self.run.validate_every or max(1, self.steps.steps // 10)


def kept_as(name: str) -> str:
    """What the copy of a configuration is called in the output folder."""
    return "config.json" if name.endswith(".json") else "config.toml"


def read_job(path: Path) -> tuple[JobConfig, bytes]:
    """A job and the bytes that it was read from; raises TrainingConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingConfigError(f"{path.name} cannot be read as UTF-8 text: check its name and kind.") from error
    if len(data) > MOST_BYTES:
        raise TrainingConfigError(f"{path.name} is too large for a configuration: data belong in files of their own.")
    return parse_job(text, path.name, path.resolve().parent), data


def parse_job(text: str, name: str, folder: Path) -> JobConfig:
    """A job from a file's text, JSON if `name` ends so; `folder` is where relative paths start.

    Raises TrainingConfigError, with what is wrong in `details` too: `mistakes`, each a field, its line and a reason.
    """
    language, load = ("JSON", json.loads) if name.endswith(".json") else ("TOML", tomllib.loads)
    try:
        if DEEP_KEY.search(text):
            raise TrainingConfigError(f"{name}: no setting has a name of so many parts.")
        written = load(text)
        document = json.dumps(written, allow_nan=False)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise TrainingConfigError(f"{name} is not {language}: {error}.") from error
    except RecursionError as error:
        raise TrainingConfigError(f"{name}: no setting is nested so deeply.") from error
    except (TypeError, ValueError) as error:
        raise TrainingConfigError(f"{name}: no setting is a date, a time, inf or nan.") from error
    try:
        config = JobConfig.model_validate_json(document)
    except ValidationError as error:
        _refuse(error, text, name)
    if conflicts := [_told(text, place, reason) for place, reason in _conflicts(config, written)]:
        raise _refusal(conflicts, name, conflicts[0]["field"])
    return _placed(config, folder)


def _placed(config: JobConfig, folder: Path) -> JobConfig:
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


def _refuse(error: ValidationError, text: str, name: str) -> NoReturn:
    """Say many mistakes at once, each with its line."""
    first = error.errors()[0]
    known = first["loc"][:-1] if first["type"] in UNKNOWN else first["loc"]
    told = [_mistake(mistake, text) for mistake in error.errors()[:MOST_TOLD]]
    raise _refusal(told, name, ".".join(map(str, known)) or None) from error


def _refusal(told: Sequence[Mapping[str, Any]], name: str, param: str | None) -> TrainingConfigError:
    said = []
    for each in told:
        where = f"{name}, line {each['line']}" if each["line"] else name
        said.append(f"{where}: {each['field']}: {each['reason']}")
    return TrainingConfigError("\n".join(said), param=param, details={"mistakes": told[:MOST_DETAILED]})


def _mistake(mistake: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A field, its line and what is wrong with it."""
    place = [str(part) for part in mistake["loc"] if not isinstance(part, int)]
    match mistake["type"]:
        case kind if kind in UNKNOWN:
            known = _fields_of(place[:-1])
            near = difflib.get_close_matches(place[-1], known, 1)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            reason = f"there is no such field here{meant} Allowed are {', '.join(known)}"
        case "missing":
            reason = "is missing"
        case "value_error":
            reason = str(mistake["ctx"]["error"])
        case _:
            reason = mistake["msg"][:1].lower() + mistake["msg"][1:]
    return _told(text, place, reason)


def _told(text: str, place: Sequence[str], reason: str) -> dict[str, Any]:
    return {"field": ".".join(place), "line": _line_of(text, place), "reason": f"{reason}."}


def _conflicts(config: JobConfig, written: Mapping[str, Any]) -> Iterator[tuple[Sequence[str], str]]:
    """What does not go together, each with its place; `written` is the file as it stands, without defaults."""
    method = config.method
    if method.width is not None and method.name != "adapter":
        yield ["method", "width"], "is of adapters alone"
    if config.run.metric is not None and config.task.kind != "caption":
        yield ["run", "metric"], "only captions have a choice of metrics"
    if method.name == "prompt":
        return
    for section in ("prompt", "begin", "publish"):
        if section in written:
            yield [section], f"has no meaning for {method.name}, which learns no prompt"
    if "learning_rate" not in written["steps"]:
        usual = USUAL_RATES[method.name]
        yield ["steps", "learning_rate"], f"is missing: the default is for prompts; the released {usual}"
    if config.machine.dtype == "bfloat16":
        yield ["machine", "dtype"], f"{method.name} trains weights in float32: let compute.autocast round instead"


USUAL_RATES: Mapping[str, str] = {
    "bitfit": "script tries 5e-5 and 1e-4",
    "bitfit-full": "script of bitfit tries 5e-5 and 1e-4",
    "adapter": "script tries 5e-5 and 1e-4",
    "finetune": "scripts take 1e-5 to 5e-5",
}
"""ofa-spec 5 and 9.6."""

SECTIONS: Mapping[str, type] = {
    "task": TaskConfig,
    "data": DataConfig,
    "method": MethodConfig,
    "prompt": PromptRecipe,
    "begin": BeginConfig,
    "steps": StepRecipe,
    "run": RunConfig,
    "compute": ComputeRecipe,
    "machine": MachineConfig,
    "publish": PublishConfig,
}


def _fields_of(place: Sequence[str]) -> list[str]:
    """Names that may stand in a section."""
    if not place:
        return list(JobConfig.model_fields)
    owner: type = SourceConfig if len(place) > 1 else SECTIONS[place[0]]
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
