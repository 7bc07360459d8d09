"""How soon a prompt has learned a shipped task, by what it begins as: noise, texts, or the other tasks' prompts.

    make art scenes task-files && python benchmarks/beginnings.py --out var/beginnings

A task learns as its recipe says, from every beginning with every seed in one cohort; runs of one seed read the same
batches. The measure is the nll per target token on one batch of held-out lines, asked every few steps:

    target = F + 0.05 (S - F), where S and F are the medians over seeds of what noise has before its first step and
             behind its last: noise has made 95 % of its fall there
    steps  = the first that was asked at which a run is at or below the target of its task; steps_to_final: at F itself

Texts are those of the recipe's `[begin]`; the prompts to begin from are the shipped ones of the other tasks, never the
task's own. The command may be stopped at any time; given again, it goes on from its checkpoints. Steps do not depend on
the machine's load.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from engines import report
from promptmux_kernels import pack_prompts
from promptmux_prompts import Prompt
from promptmux_server.backbone.assemble import assemble
from promptmux_server.backbone.weights import LoadedBackbone, load_backbone
from promptmux_server.errors import PromptmuxError
from promptmux_server.pocket import LIBRARY, WEIGHTS
from promptmux_server.training.batch import TrainingBatch, seen
from promptmux_server.training.cohort import Cohort
from promptmux_server.training.forward import supervised_logits
from promptmux_server.training.initial import Begin
from promptmux_server.training.job import BEGUN_FROM, Job, held
from promptmux_server.training.job_config import BeginConfig, JobConfig, read_job
from promptmux_server.training.job_parts import method_of
from promptmux_server.training.loss import label_smoothed_loss
from promptmux_server.training.material import Material
from promptmux_server.training.metrics import Score
from promptmux_server.training.published import PublishedFolder
from promptmux_server.training.recipe import PLAINLY
from promptmux_server.training.validation import Exam, OpenBackbone

NOISE, ENCODER_TEXT = "noise", "text-encoder-only"
BEGINNINGS: Mapping[str, BeginConfig | None] = {
    NOISE: BeginConfig(),
    "text": None,
    ENCODER_TEXT: None,
    "nearest": BeginConfig(nearest=1, among=str(LIBRARY)),
    "mean-of-nearest-2": BeginConfig(nearest=2, among=str(LIBRARY)),
}
"""None: the recipe's own."""


class OtherTasks(PublishedFolder):
    """A folder's prompts but for one task's own."""

    def __init__(self, task: str, place: str, backbone: LoadedBackbone) -> None:
        super().__init__(place, backbone)
        self._task = task

    def names(self) -> Iterable[str]:
        return [name for name in super().names() if name != self._task]


@dataclass(frozen=True)
class HeldOut:
    """Scores a prompt by a batch that it never learns from: minus the nats per target token, since more is better."""

    batch: TrainingBatch

    @classmethod
    def of(cls, recipe: JobConfig, backbone: OpenBackbone) -> HeldOut:
        """As many held-out lines of a task as its recipe has rows."""
        (source,) = recipe.data.train
        lines = replace(source, path=source.path.with_name(f"{recipe.task.name}.heldout.jsonl"))
        asked = recipe.model_copy(update={"data": replace(recipe.data, train=[lines])})
        with Material(asked, backbone) as material:
            return cls(material.start("held out", method_of(asked, backbone), asked.steps).take().batch)

    @torch.no_grad()
    def __call__(self, backbone: OpenBackbone, prompt: Prompt, exam: Exam) -> Score:
        batch, model, rows = self.batch, backbone.model, len(self.batch.examples)
        encoder = pack_prompts([(prompt.encoder_key, prompt.encoder_value)], [0] * rows)
        decoder = pack_prompts([(prompt.decoder_key, prompt.decoder_value)], [0] * rows)
        logits, targets = supervised_logits(model, batch.examples, seen(model, batch.pictures), encoder, decoder)
        allowed, confidence = batch.allowed(logits.shape[1]), batch.confidence()
        loss = label_smoothed_loss(logits, targets, smoothing=0.0, allowed=allowed, confidence=confidence)
        return Score("log_likelihood", -float(loss.nll) / loss.tokens, rows)


def settings(recipe: JobConfig, given: argparse.Namespace, beginning: str, seed: int) -> JobConfig:
    """A task's recipe for one beginning and seed, as long as the command says."""
    changes = {
        "output": given.out / recipe.task.name / beginning / str(seed),
        "begin": BEGINNINGS[beginning] or recipe.begin,
        "data": replace(recipe.data, seed=seed),
        "steps": replace(recipe.steps, steps=given.steps, seed=seed),
        "run": replace(recipe.run, rows=given.rows, keep_checkpoints=1),
    }
    return recipe.model_copy(update=changes)


def learn(recipe: JobConfig, backbone: OpenBackbone, given: argparse.Namespace) -> dict[str, list[Job]]:
    """All runs of a task to their ends, from where they stand; by beginning."""
    scorer, others = HeldOut.of(recipe, backbone), partial(OtherTasks, recipe.task.name)
    jobs: dict[str, list[Job]] = {beginning: [] for beginning in (NOISE, *(given.beginning or BEGINNINGS))}
    with ExitStack() as opened:
        for seed in range(1, given.seeds + 1):
            material = opened.enter_context(Material(settings(recipe, given, NOISE, seed), backbone))
            for beginning, several in jobs.items():
                name, config = f"{beginning} {seed}", settings(recipe, given, beginning, seed)
                opened.enter_context(held(config))
                job = opened.enter_context(Job(config, backbone, scorer, others, material=material, name=name))
                several.append(job)
                if job.resume() == 0 and not job.scores():
                    if beginning == ENCODER_TEXT:
                        begin = Begin(job.method.parameters["encoder.embedding.weight"].detach())
                        job.run = material.start(name, method_of(config, backbone, begin), config.steps)
                    job.keep_scored()
        advance({job.run.name: job for several in jobs.values() for job in several}, given.every)
    return jobs


def advance(jobs: Mapping[str, Job], every: int) -> None:
    cohort = Cohort()
    for run in (job.run for job in jobs.values() if not job.run.finished):
        cohort.join(run)
    while cohort.runs:
        advanced = cohort.advance()
        for failure in advanced.failed:
            raise failure.error
        for step in advanced.steps:
            job = jobs[step.run]
            job.record(step)
            if step.step % every == 0 or job.run.finished:
                job.keep_scored()


def table(jobs: Mapping[str, Sequence[Job]], last: int) -> dict[str, dict[str, object]]:
    """The measures of a task's runs, by beginning."""
    losses = {beginning: [asked(job.config.output) for job in several] for beginning, several in jobs.items()}
    start, final = (statistics.median(run[step] for run in losses[NOISE]) for step in (0, last))
    target = final + 0.05 * (start - final)
    return {
        beginning: {
            "steps": [reached(run, target) for run in runs],
            "steps_to_final": [reached(run, final) for run in runs],
            "before": round(statistics.median(run[0] for run in runs), 3),
            "after": round(statistics.median(run[last] for run in runs), 3),
            BEGUN_FROM: [job.learned().manifest.provenance[BEGUN_FROM] for job in jobs[beginning]],
        }
        for beginning, runs in losses.items()
    }


def asked(folder: Path) -> dict[int, float]:
    """A run's held-out nll by step."""
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return {line["step"]: -line["value"] for line in lines if "value" in line}


def reached(run: Mapping[int, float], loss: float) -> int | None:
    """The first step that was asked at which a run's loss is no higher."""
    return min((step for step, value in run.items() if value <= loss), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", type=Path, default=Path("prompts/recipes"))
    parser.add_argument("--task", action="append", help="only this recipe's (may be repeated)")
    parser.add_argument("--beginning", choices=BEGINNINGS, action="append", help="only this one, beside noise")
    for option, default in {"rows": 8, "steps": 120, "every": 10, "seeds": 3, "threads": 1}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(given.threads)
    loaded = load_backbone(WEIGHTS)
    backbone = OpenBackbone(loaded, assemble(loaded, dtype=torch.float32), loaded.tokenizer())
    for task in given.task or sorted(path.stem for path in given.recipes.glob("*.toml")):
        try:
            recipe, _ = read_job(given.recipes / f"{task}.toml")
            recipe = recipe.model_copy(update={"cache": given.out / "cache", "compute": PLAINLY})
            found = table(learn(recipe, backbone, given), given.steps)
        except PromptmuxError as error:
            raise SystemExit(f"{task}: {error.message}") from error
        about = {"task": task, "fingerprint": loaded.fingerprint, "rows": given.rows, "steps": given.steps}
        report("beginnings", "pocket", dtype=torch.float32, **about, beginnings=found)


if __name__ == "__main__":
    main()
