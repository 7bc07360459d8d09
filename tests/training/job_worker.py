"""A small training job on the tiny backbone, and processes of their own that run it and may be killed at any moment.

Importing torch takes a second, so one process imports it and forks for each run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
from promptmux_prompts import Prompt
from promptmux_server.training.data.source import SourceConfig
from promptmux_server.training.data.task_data import DataConfig
from promptmux_server.training.job import Job, Learned, held
from promptmux_server.training.job_config import JobConfig, MethodConfig, RunConfig, TaskConfig
from promptmux_server.training.metrics import Score
from promptmux_server.training.recipe import PromptRecipe, StepRecipe
from promptmux_server.training.validation import Exam, OpenBackbone, Scorer
from training.data.data_files import pictures, write_jsonl

STEPS = 24


def data(folder: Path, count: int = 12) -> Path:
    """A file of questions about pictures, beside them."""
    path = folder / "data.jsonl"
    if not path.exists():
        pictures(folder, count)
        lines = [
            {"image": f"{i}.png", "text": f"how many {i % 3}", "answer": "one" if i % 2 else "two"}
            for i in range(count)
        ]
        write_jsonl(path, lines)
    return path


def recipe(steps: int = STEPS) -> StepRecipe:
    """With all that a checkpoint must remember."""
    return StepRecipe(steps=steps, learning_rate=0.05, average_decay=0.9, accumulation=2)


def config(
    folder: Path,
    *,
    steps: StepRecipe | None = None,
    method: MethodConfig | None = None,
    prompt: PromptRecipe | None = None,
    **run: Any,
) -> JobConfig:
    """The job over `data` of the folder; its output lies in `out` there."""
    rhythm: dict[str, Any] = {"rows": 3, "validate_every": 8, "checkpoint_every": 2, **run}
    return JobConfig(
        output=folder / "out",
        cache=folder / "cache",
        task=TaskConfig(name="counting", kind="answer"),
        data=DataConfig(train=[SourceConfig(path=data(folder))], heldout=0.3),
        method=method or MethodConfig(),
        prompt=prompt or PromptRecipe(encoder_length=4, decoder_length=3),
        steps=steps or recipe(),
        run=RunConfig(**rhythm),
    )


def backbone() -> OpenBackbone:
    return OpenBackbone(tiny.backbone(), tiny.model(), tiny.tokenizer())


def any_score(backbone: OpenBackbone, prompt: Prompt, exam: Exam) -> Score:
    """A number that every bit of a prompt decides."""
    return Score("any", int(prompt.digest[:8], 16) / 2**32, len(exam.questions))


def job(folder: Path, scorer: Scorer = any_score, **changes: Any) -> Job:
    return Job(config(folder, **changes), backbone(), scorer)


def run_to_the_end(folder: Path, **changes: Any) -> Learned:
    """Begin or go on; a line of `steps.log` for every step."""
    with (
        held(config(folder, **changes)),
        job(folder, **changes) as opened,
        (folder / "steps.log").open("a", buffering=1) as log,
    ):
        opened.resume()
        for _ in opened.events():
            log.write(f"{opened.run.step}\n")
        return opened.learned()


class Forks:
    """Starts runs and waits for them."""

    def __init__(self, module: str = __name__) -> None:
        """Whose `main(folder, steps)` a started process runs."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {module} import main; from training.job_worker import serve; serve(main)"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, folder: Path, steps: int = STEPS) -> int:
        return self._ask(f"{steps} {folder}")

    def wait(self, process: int) -> int:
        """Its exit code, or minus the signal that killed it."""
        return self._ask(f"wait {process}")

    def kill(self, process: int) -> int:
        os.kill(process, signal.SIGKILL)
        return self.wait(process)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def forks(module: str = __name__) -> Iterator[Forks]:
    started = Forks(module)
    try:
        yield started
    finally:
        started.close()


def serve(main: Callable[[Path, int], None]) -> None:
    """What the importing process does."""
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        verb, argument = line.strip().split(" ", 1)
        if verb == "wait":
            _, status = os.waitpid(int(argument), 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        process = os.fork()
        if process == 0:
            _work(main, Path(argument), int(verb))
        print(process, flush=True)


def main(folder: Path, steps: int) -> None:
    learned = run_to_the_end(folder, steps=recipe(steps))
    assert isinstance(learned, Prompt)
    (folder / "digest").write_text(learned.digest)


def _work(main: Callable[[Path, int], None], folder: Path, steps: int) -> None:
    status = 1
    try:
        main(folder, steps)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
