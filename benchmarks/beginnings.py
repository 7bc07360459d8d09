"""How soon a prompt has learned a task, by what it begins as: noise, texts, or the other tasks' prompts.

    make art scenes && python benchmarks/beginnings.py --out var/beginnings

Every beginning and seed of a task learns in one cohort, on the same batches for the same seed. The measure is the nll
per target token on held-out scenes, asked every few steps:

    target = F + 0.05 (S - F), where S and F are the medians over seeds of what noise has before its first step and
             behind its last: noise has made 95 % of its fall there
    steps  = the first that was asked at which a run is at or below the target of its task; steps_to_final: at F itself

The prompts to begin from are the shipped ones of the other tasks, never the task's own. The command may be stopped at
any time; given again, it goes on from its checkpoints. Steps do not depend on the machine's load.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from engines import report
from promptmux_kernels import pack_prompts
from promptmux_prompts import Prompt, Seed, read_seeds
from promptmux_server.backbone.assemble import assemble
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.backbone.weights import LoadedBackbone, load_backbone
from promptmux_server.pocket import LIBRARY, WEIGHTS
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.library import BEGIN_TEXTS, PROMPT, SceneBatches, stem_once, step_recipe
from promptmux_server.pocket.samples import TaskName
from promptmux_server.training.batch import Cursor, TrainingBatch, seen
from promptmux_server.training.checkpoint import Checkpoints
from promptmux_server.training.cohort import Cohort
from promptmux_server.training.curve import Curve
from promptmux_server.training.forward import supervised_logits
from promptmux_server.training.initial import FROM_NOISE, Begin, begin_of_prompts, begin_of_texts
from promptmux_server.training.methods import DeepPrompts
from promptmux_server.training.metrics import Score
from promptmux_server.training.nearest import PROBES, nearest
from promptmux_server.training.recipe import PLAINLY, StepRecipe
from promptmux_server.training.run import Run

TASKS: tuple[TaskName, ...] = ("scene-entailment", "scene-vqa", "scene-caption", "scene-grounding")
TEXTS: dict[TaskName, tuple[str, ...]] = {
    "scene-entailment": (BEGIN_TEXTS["scene-entailment"], " yes", " no", " maybe"),
    "scene-vqa": (BEGIN_TEXTS["scene-vqa"], " yes", " no", " two", " red"),
    "scene-caption": (BEGIN_TEXTS["scene-caption"],),
    "scene-grounding": (BEGIN_TEXTS["scene-grounding"],),
}
"""The instruction in pretraining's words, and words of the answers."""
BEGINNINGS = ("noise", "text", "text, encoder only", "nearest", "mean of the nearest 2")
FALL = 0.95
SEEDS_APART = 100_000
"""Batches."""


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    backbone: LoadedBackbone
    model: OFA
    tokenizer: Tokenizer
    train: SceneDataset
    heldout: SceneDataset
    pictures: int
    rows: int
    steps: int

    def tables(self, texts: Sequence[str]) -> Begin:
        return begin_of_texts(self.model, [(BOS, *self.tokenizer.encode(text), EOS) for text in texts])


class FirstRows:
    """The first rows of every batch of a seed."""

    def __init__(self, inner: SceneBatches, rows: int, seed: int) -> None:
        self._inner, self._rows, self._first = inner, rows, SEEDS_APART * seed

    def take(self, cursor: Cursor) -> tuple[TrainingBatch, Cursor]:
        number = cursor if isinstance(cursor, int) else self._first
        batch, ahead = self._inner.take(number)
        return replace(batch, examples=batch.examples[: self._rows], pictures=batch.pictures[: self._rows]), ahead


class TaskBench:
    """One task: its runs, by beginning and seed."""

    def __init__(self, bench: Bench, task: TaskName, folder: Path) -> None:
        self.bench, self.task, self.folder = bench, task, folder
        self._batches = self._scenes(bench.train, bench.pictures)
        self.asked, _ = self._scenes(bench.heldout, bench.pictures).take(0)

    def _scenes(self, data: SceneDataset, pictures: int) -> SceneBatches:
        bench = self.bench
        tokens = stem_once(bench.model, data, range(min(pictures, len(data))))
        return SceneBatches(self.task, bench.backbone, bench.tokenizer, data, tokens)

    def recipe(self, seed: int) -> StepRecipe:
        return replace(step_recipe(self.task), steps=self.bench.steps, seed=seed)

    def run(self, name: str, begin: Begin, recipe: StepRecipe) -> Run:
        method = DeepPrompts(self.bench.model, PROMPT, seed=recipe.seed, begin=begin)
        return Run(name, method, recipe, FirstRows(self._batches, self.bench.rows, recipe.seed))

    def begin(self, beginning: str, seed: int) -> Begin:
        found: dict[str, Callable[[], Begin]] = {
            "noise": lambda: FROM_NOISE,
            "text": lambda: self.bench.tables(TEXTS[self.task]),
            "text, encoder only": lambda: Begin(self.bench.tables([BEGIN_TEXTS[self.task]]).encoder),
            "nearest": lambda: self._nearest(1, seed),
            "mean of the nearest 2": lambda: self._nearest(2, seed),
        }
        return found[beginning]()

    def _nearest(self, k: int, seed: int) -> Begin:
        recipe = replace(self.recipe(seed), steps=PROBES, warmup=0.0)

        def probe(prompt: Prompt) -> Run:
            return self.run(prompt.digest, begin_of_prompts([prompt], *lengths()), recipe)

        near = nearest(self._others(), k, probe, PLAINLY)
        told = {each.prompt.manifest.name: round(each.distance, 4) for each in near}
        print(json.dumps({"task": self.task, "seed": seed, "nearest": told}), flush=True)
        return begin_of_prompts([each.prompt for each in near], *lengths())

    def _others(self) -> list[Prompt]:
        loaded = self.bench.backbone
        seeds = read_seeds(LIBRARY, shape=loaded.prompt_shape, fingerprint=loaded.fingerprint, dtype=torch.float32)
        return [each.prompt for each in seeds if isinstance(each, Seed) and each.name != self.task]

    @torch.no_grad()
    def heldout_nll(self, run: Run) -> float:
        """Nats per target token."""
        assert isinstance(run.method, DeepPrompts)
        rows, model = len(self.asked.examples), self.bench.model
        encoder, decoder = (pack_prompts([side], [0] * rows) for side in run.method.sides(run.values()))
        pictures = seen(model, self.asked.pictures)
        logits, targets = supervised_logits(model, self.asked.examples, pictures, encoder, decoder)
        loss = run.loss(logits, targets, self.asked)
        return float(loss.nll) / loss.tokens

    def learn(self, beginnings: Sequence[str], seeds: int, every: int) -> None:
        """All runs to their ends, from where they stand."""
        cohort, kept = Cohort(), {}
        for name in beginnings:
            for seed in range(1, seeds + 1):
                kept[f"{name} {seed}"] = KeptRun(self, name, seed)
        for run in (each.run for each in kept.values() if not each.run.finished):
            cohort.join(run)
        while cohort.runs:
            advance = cohort.advance()
            for failure in advance.failed:
                raise failure.error
            for step in advance.steps:
                kept[step.run].curve.add(step)
                if step.step % every == 0 or step.step == self.bench.steps:
                    kept[step.run].ask()


class KeptRun:
    """A run with its folder: checkpoints, and the curve of its steps and of what it was asked."""

    def __init__(self, bench: TaskBench, beginning: str, seed: int) -> None:
        self._bench = bench
        folder = bench.folder / f"{beginning.replace(', ', '-').replace(' ', '-')}-{seed}"
        self._checkpoints, self.curve = Checkpoints(folder / "checkpoints", keep_last=1), Curve(folder / "curve.jsonl")
        found = self._checkpoints.newest()
        begin = FROM_NOISE if found else bench.begin(beginning, seed)
        self.run = bench.run(f"{beginning} {seed}", begin, bench.recipe(seed))
        if found:
            self.run.restore(found.state)
        self.curve.go_back(self.run.step)
        if not found:
            self.ask()

    def ask(self) -> None:
        """The held-out loss of the moment, kept with the run."""
        score = Score("nll", self._bench.heldout_nll(self.run), len(self._bench.asked.examples))
        self.curve.add_score(self.run.step, score)
        self._checkpoints.save(self.run.state(), {})


def lengths() -> tuple[int, int]:
    return PROMPT.encoder_length, PROMPT.decoder_length


def asked(folder: Path) -> dict[str, list[dict[int, float]]]:
    """Of a task's folder, by beginning, every seed's held-out losses by step."""
    found: dict[str, list[dict[int, float]]] = {}
    for path in sorted(folder.glob("*/curve.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        losses = {line["step"]: line["value"] for line in lines if "value" in line}
        found.setdefault(path.parent.name.rpartition("-")[0], []).append(losses)
    return found


def table(folder: Path) -> dict[str, dict[str, object]]:
    """The measures of a task's runs, by beginning."""
    losses = asked(folder)
    last = max(losses["noise"][0])
    start, final = (statistics.median(run[step] for run in losses["noise"]) for step in (0, last))
    target = final + (1 - FALL) * (start - final)
    return {
        name: {
            "steps": [reached(run, target) for run in runs],
            "steps_to_final": [reached(run, final) for run in runs],
            "before": round(statistics.median(run[0] for run in runs), 3),
            "after": round(statistics.median(run[last] for run in runs), 3),
        }
        for name, runs in losses.items()
    }


def reached(run: Mapping[int, float], loss: float) -> int | None:
    """The first step that was asked at which a run's loss is no higher."""
    return min((step for step, value in run.items() if value <= loss), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", choices=get_args(TaskName), action="append", help="only this task (may be repeated)")
    parser.add_argument("--beginning", choices=BEGINNINGS, action="append", help="only this one (noise is needed)")
    parser.add_argument("--train", type=Path, default=Path("var/pocket/train"))
    parser.add_argument("--heldout", type=Path, default=Path("var/pocket/heldout"))
    for option, default in {"pictures": 1000, "rows": 8, "steps": 120, "every": 10, "seeds": 3, "threads": 1}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loaded = load_backbone(WEIGHTS)
    model = assemble(loaded, dtype=torch.float32)
    data = SceneDataset(given.train), SceneDataset(given.heldout)
    bench = Bench(loaded, model, loaded.tokenizer(), *data, given.pictures, given.rows, given.steps)
    for task in given.task or TASKS:
        folder = given.out / task
        TaskBench(bench, task, folder).learn(given.beginning or BEGINNINGS, given.seeds, given.every)
        about = {"task": task, "fingerprint": loaded.fingerprint, "rows": given.rows, "steps": given.steps}
        report("beginnings", "pocket", dtype=torch.float32, **about, beginnings=table(folder))


if __name__ == "__main__":
    main()
