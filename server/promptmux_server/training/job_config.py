"""What one training job is, as written in TOML or JSON: nouns, defaults, bounds, and what does not go together.

Owns the file's sections; what is said of mistakes in it is `config_mistakes`' business. Opens none of the files that
are named.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from promptmux_prompts import Kind
from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.config_mistakes import Conflict, check_none, refuse
from promptmux_server.training.data.source import SourceConfig
from promptmux_server.training.data.task_data import DataConfig
from promptmux_server.training.methods.weights import WeightsMethod
from promptmux_server.training.metrics import CaptionMetric
from promptmux_server.training.recipe import ComputeRecipe, PromptRecipe, StepRecipe

Count = Annotated[int, Field(ge=1)]
MOST_BYTES = 1 << 20
DEEP_KEY = re.compile(r"""^[ \t]*(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){9}""", re.MULTILINE)
"""A name of more parts than any setting has. The time that the parser takes grows with the square of their number:
16,000 took it 2.4 s."""
Texts = Annotated[Sequence[str], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]
PROMPT_FILE = ".safetensors"
SERVER = ("http://", "https://")


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
    """What the prompt is before the first step: noise, unless one of the first three says more."""

    text: Texts | None = None
    """The keys and values that the backbone computes for one text or several, on both sides."""
    prompt: str | None = None
    """A prompt file, or a name that `among` knows."""
    nearest: Count | None = None
    """The mean of so many prompts of `among`, those from which the task's first steps learn best."""
    among: str | None = None
    """A folder of prompt files, a server's `registry` folder, or a server's address."""

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.text, self.prompt, self.nearest)) > 1:
            raise ValueError("say only one of text, prompt and nearest")
        if self.text is not None and not (self.text and all(text.strip() for text in self.text)):
            raise ValueError("text must not be empty")
        by_name = self.prompt is not None and not self.prompt.endswith(PROMPT_FILE)
        if (self.nearest is not None or by_name) and self.among is None:
            raise ValueError(
                "say where the prompts are: among must be a folder or a server's address "
                f"(the name of a single prompt's file ends in {PROMPT_FILE})"
            )
        if self.among is not None and self.nearest is None and not by_name:
            raise ValueError("among goes with nearest, or with the name of a prompt")

    @property
    def asked(self) -> list[Any]:
        """The same for equal beginnings, wherever files lie; a JSON value."""
        prompt = None if self.prompt is None else Path(self.prompt).name
        return [None if self.text is None else list(self.text), prompt, self.nearest]


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
    patience_s: Annotated[float, Field(gt=0)] = 600.0
    """How long one of several processes waits for another, for instance while it scores, before it gives up."""


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """When a trained prompt replaces the one that is served."""

    name: str | None = None
    """None: the task's."""
    margin: float = 0.0
    """By which its score must exceed that of the served one on the same samples."""


USUAL_RATES: Mapping[str, str] = {
    "bitfit": "script tries 5e-5 and 1e-4",
    "bitfit-full": "script of bitfit tries 5e-5 and 1e-4",
    "adapter": "script tries 5e-5 and 1e-4",
    "finetune": "scripts take 1e-5 to 5e-5",
}
"""ofa-spec 5 and 9.6."""


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

    def conflicts(self, written: Mapping[str, Any]) -> Iterator[Conflict]:
        """What does not go together, each with its place; `written` is the file as it stands, without defaults."""
        method = self.method
        if method.width is not None and method.name != "adapter":
            yield ["method", "width"], "is of adapters alone"
        if self.run.metric is not None and self.task.kind != "caption":
            yield ["run", "metric"], "only captions have a choice of metrics"
        if method.name == "prompt":
            return
        for section in ("prompt", "begin", "publish"):
            if section in written:
                yield [section], f"has no meaning for {method.name}, which learns no prompt"
        if "learning_rate" not in written["steps"]:
            usual = USUAL_RATES[method.name]
            yield ["steps", "learning_rate"], f"is missing: the default is for prompts; the released {usual}"
        if self.machine.dtype == "bfloat16":
            yield ["machine", "dtype"], f"{method.name} trains weights in float32: let compute.autocast round instead"


Config = TypeVar("Config", bound=JobConfig)


def kept_as(name: str) -> str:
    """What the copy of a configuration is called in the output folder."""
    return "config.json" if name.endswith(".json") else "config.toml"


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
    """A job from a file's text, JSON if `name` ends so; `folder` is where relative paths start.

    Raises TrainingConfigError, with what is wrong in `details` too: `mistakes`, each a field, its line and a reason.
    """
    return parse_config(JobConfig, text, name, folder)


def parse_config(model: type[Config], text: str, name: str, folder: Path) -> Config:
    """A job, or a job with sections of its own, as `parse_job`."""
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
        config = model.model_validate_json(document)
    except ValidationError as error:
        refuse(error, model, text, name)
    check_none(config.conflicts(written), text, name)
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
    begin, among, prompt = config.begin, config.begin.among, config.begin.prompt
    if among is not None and not among.startswith(SERVER):
        begin = replace(begin, among=str(folder / among))
    if prompt is not None and prompt.endswith(PROMPT_FILE):
        begin = replace(begin, prompt=str(folder / prompt))
    changes = {"begin": begin, "backbone": backbone, "output": folder / config.output, "cache": cache, "data": placed}
    return config.model_copy(update=changes)
