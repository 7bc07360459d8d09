"""Whether everything that a job opens and writes lies within one folder, whatever links lie on the way.

Another server is no folder: a job that is asked for from elsewhere reaches none, and shows none this machine's key.

For configurations that come from elsewhere than this machine's own terminal. Opens nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.job_config import PROMPT_FILE, SERVER, BeginConfig, JobConfig

OF_A_RUN = frozenset({"cache", "checkpoints"})
"""One of these is in the output folder of every run that has begun."""


def confine(config: JobConfig, root: Path) -> None:
    """Raise TrainingConfigError, naming the field, for a path that leads out of `root`, and for a server's address."""
    if config.begin.among is not None and config.begin.among.startswith(SERVER):
        raise TrainingConfigError(
            "begin.among: this names a server, and here prompts begin from files: name a folder of them.",
            param="begin.among",
        )
    inside = root.resolve()
    for field, path in _paths(config):
        try:
            leaves = not path.resolve().is_relative_to(inside)
        except (OSError, RuntimeError, ValueError):  # a ring of links, a zero byte
            leaves = True
        if leaves:
            raise TrainingConfigError(
                f"{field}: this path leads out of the folder that trainings may use. Name it relative to that folder, "
                "without .. and without links that leave it.",
                param=field,
            )


def check_output(config: JobConfig) -> None:
    """Raise TrainingConfigError for an output folder that holds something else than a run."""
    try:
        held = {entry.name for entry in config.output.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise TrainingConfigError("output: this is no folder that can be written to.", param="output") from error
    if held and not held & OF_A_RUN:
        raise TrainingConfigError("output: this folder holds other things: choose a new one.", param="output")


def _paths(config: JobConfig) -> Iterator[tuple[str, Path]]:
    """Every path of a job by its field."""
    if config.backbone != "pocket":
        yield "backbone", Path(config.backbone)
    yield "output", config.output
    if config.cache is not None:
        yield "cache", config.cache
    yield from _paths_begun_from(config.begin)
    sources = {f"data.train.{place}": source for place, source in enumerate(config.data.train)}
    if config.data.validation is not None:
        sources["data.validation"] = config.data.validation
    for field, source in sources.items():
        yield f"{field}.path", source.path
        if source.images is not None:
            yield f"{field}.images", source.images
        if source.annotations is not None:
            yield f"{field}.annotations", source.annotations


def _paths_begun_from(begin: BeginConfig) -> Iterator[tuple[str, Path]]:
    if begin.among is not None:
        yield "begin.among", Path(begin.among)
    if begin.prompt is not None:
        named = "" if begin.prompt.endswith(PROMPT_FILE) else PROMPT_FILE
        yield "begin.prompt", Path(begin.among or "", begin.prompt + named)
