"""A small search on the tiny backbone: what the search's tests share, and a process of its own that may be killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from promptmux_server.training.job_config import RunConfig
from promptmux_server.training.recipe import PLAINLY, ComputeRecipe, StepRecipe
from promptmux_server.training.search.config import SearchConfig, SearchJobConfig
from promptmux_server.training.search.record import TrialRecord
from promptmux_server.training.search.search import Event, Search
from promptmux_server.training.search.space import Axis, Choice, Range
from promptmux_server.training.validation import Scorer
from training import job_worker

SPACE: dict[str, Axis] = {
    "learning_rate": Range(0.001, 0.5, log=True),
    "encoder_length": Choice((0, 2, 5)),
    "decoder_length": Range(1, 4),
    "dropout": Choice((0.0, 0.2)),
}


def config(
    folder: Path,
    *,
    space: dict[str, Axis] | None = None,
    steps: int = 6,
    compute: ComputeRecipe = PLAINLY,
    **search: object,
) -> SearchJobConfig:
    """A search over the data of `job_worker`; its output lies in `search` of the folder."""
    base = job_worker.config(folder, steps=StepRecipe(steps=steps, warmup=0.2, learning_rate=0.05))
    asked = {"trials": 8, "at_once": 4, "rungs": [2, 4], "reduction": 2, **search}
    given = {name: getattr(base, name) for name in type(base).model_fields}
    given |= {"output": folder / "search", "run": RunConfig(rows=3, checkpoint_every=3), "compute": compute}
    return SearchJobConfig(**given, search=SearchConfig(space=space or SPACE, **asked))  # type: ignore[arg-type]


def search(folder: Path, scorer: Scorer = job_worker.any_score, **changes: object) -> Search:
    return Search(config(folder, **changes), job_worker.backbone(), scorer)  # type: ignore[arg-type]


def run(opened: Search, stop: Callable[[], bool] = lambda: False) -> tuple[list[Event], list[TrialRecord]]:
    """Search to the end; its events and its trials."""
    with opened:
        return list(opened.events(stop)), opened.trials()


def lonely_search(folder: Path) -> Search:
    """A small search whose trials pass one by one, so that even their last bits are the same in any company."""
    return search(folder, compute=ComputeRecipe(rows_per_pass=1), trials=4, at_once=2, rungs=[2])


def main(folder: Path, _steps: int) -> None:
    """Begin or go on; the search has steps of its own."""
    run(lonely_search(folder))
    (folder / "done").touch()
