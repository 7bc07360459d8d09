"""Two processes that train the job of `job_worker` together, over gloo and a file: for tests.

    python -c 'from training.rank_worker import main; main()' FOLDER SCENARIO...

Each scenario trains in a folder of its own name, in two forks of the process that has imported torch; what fork N has
to tell is in `SCENARIO-N.json`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from promptmux_server.errors import PeerLost
from promptmux_server.training.job import Job
from promptmux_server.training.job_config import JobConfig
from promptmux_server.training.ranks import Together
from promptmux_server.training.recipe import PromptRecipe, StepRecipe
from promptmux_server.training.shared import follow
from training.job_worker import any_score, backbone, config

COUNT = 2
PATIENCE_S = 5.0
STOP_AT = LOST_AT = 3
PLAIN = StepRecipe(steps=8, learning_rate=0.05, accumulation=2)
NOISY = StepRecipe(steps=8, learning_rate=0.05, backbone_dropout=0.1, backbone_drop_path=0.2, average_decay=0.9)


def job_config(folder: Path, scenario: str) -> JobConfig:
    """Five rows a batch, which two processes share as three and two."""
    noisy = scenario == "noisy"
    made = config(folder, steps=NOISY if noisy else PLAIN, rows=5, validate_every=4)
    prompt = PromptRecipe(encoder_length=4, decoder_length=3, dropout=0.2 if noisy else 0.0)
    return made.model_copy(update={"prompt": prompt})


def run_scenarios(folder: Path, scenarios: Sequence[str], within_s: float) -> None:
    """Train them one after another; raises CalledProcessError where a fork failed in a way of its own."""
    subprocess.run(
        [sys.executable, "-c", "from training.rank_worker import main; main()", str(folder), *scenarios],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=within_s,
        check=True,
    )


def main() -> None:
    torch.set_num_threads(1)
    backbone()  # once, for all forks
    folder = Path(sys.argv[1])
    for scenario in sys.argv[2:]:
        leader, other = (_fork(folder, scenario, number) for number in range(COUNT))
        _, status = os.waitpid(leader, 0)
        if scenario == "silent":
            os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        if os.waitstatus_to_exitcode(status):
            sys.exit(1)


def _fork(folder: Path, scenario: str, number: int) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        store = dist.FileStore(str(folder / f"{scenario}-store"), COUNT)
        dist.init_process_group(
            "gloo", store=store, rank=number, world_size=COUNT, timeout=timedelta(seconds=PATIENCE_S)
        )
        told = _train(folder / scenario, scenario, number)
        (folder / f"{scenario}-{number}.json").write_text(json.dumps(told))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


class Unreduced(Together):
    """Each keeps its own gradients."""

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        pass


def _train(folder: Path, scenario: str, number: int) -> dict[str, Any]:
    ranks = Unreduced() if scenario == "unreduced" else Together()
    made, heard_s = job_config(folder, scenario), time.monotonic()
    try:
        if number:
            run = follow(made, backbone(), ranks, _stopper(scenario))
            return {"step": run.step, "sums": _sums(run.values())}
        with Job(made, backbone(), any_score, ranks=ranks) as job:
            job.resume()
            for _ in job.events():
                heard_s = time.monotonic()
            return {"step": job.run.step, "sums": _sums(job.run.values())}
    except PeerLost as error:
        return {"lost": error.message, "after_s": time.monotonic() - heard_s}


def _stopper(scenario: str) -> Callable[[], bool]:
    """Asked behind every step of the process that does not lead."""
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        if steps == LOST_AT and scenario == "dying":
            os.kill(os.getpid(), signal.SIGKILL)
        if steps == LOST_AT and scenario == "silent":
            os.kill(os.getpid(), signal.SIGSTOP)
        return steps == STOP_AT and scenario == "stopped"

    return stop


def _sums(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value.double().sum()) for name, value in values.items()}
