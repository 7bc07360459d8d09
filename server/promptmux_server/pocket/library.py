"""The four shipped prompts: their manifests, their training data, and the command that makes them.

`python -m promptmux_server.pocket.library --help` tunes, scores on held-out scenes and writes `prompts/library`.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from promptmux_prompts import ImageInput, Kind, Manifest, Prompt, write_prompt
from promptmux_server.backbone.assemble import assemble, serving_dtype
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.backbone.weights import LoadedBackbone, load_backbone
from promptmux_server.pocket import WEIGHTS
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.mixture import part_ids, to_pixels
from promptmux_server.pocket.samples import (
    ENTAILMENT_LABELS,
    INSTRUCTIONS,
    TASKS,
    TaskName,
    task_sample,
    vqa_answers,
)
from promptmux_server.pocket.scores import TaskScore, score_task
from promptmux_server.tasks import TaskSpec, encode_item
from promptmux_server.tasks.trie import Trie
from promptmux_server.training.batch import Cursor, TrainingBatch
from promptmux_server.training.cohort import Cohort
from promptmux_server.training.forward import Example
from promptmux_server.training.initial import Begin, begin_of_texts
from promptmux_server.training.methods import DeepPrompts
from promptmux_server.training.recipe import PromptRecipe, StepRecipe
from promptmux_server.training.run import Run

log = logging.getLogger(__name__)

Seen = Sequence[ImageTokens]

KINDS: dict[TaskName, Kind] = {
    "scene-caption": "caption",
    "scene-vqa": "answer",
    "scene-entailment": "label",
    "scene-grounding": "box",
}
PROMPT = PromptRecipe(encoder_length=32, decoder_length=32, dropout=0.0)
LEARNING_RATE = 0.05
"""Above the paper's 0.03: in a few hundred steps noise of N(0, 0.02) must grow to the size of real keys."""
STEPS: dict[TaskName, int] = {
    "scene-caption": 600,
    "scene-vqa": 1600,
    "scene-entailment": 700,
    "scene-grounding": 1600,
}
BEGIN_TEXTS: dict[TaskName, str] = {
    "scene-caption": " what does the image describe?",
    "scene-vqa": " question: answer in a word.",
    "scene-entailment": " does the image describe ",
    "scene-grounding": " where is ?",
}
"""Pretraining's words for the nearest thing that a task asks; the prompt begins as their keys and values."""
ROWS = 48
"""Examples a step."""
LOG_EVERY = 50


def step_recipe(task: TaskName) -> StepRecipe:
    return StepRecipe(steps=STEPS[task], learning_rate=LEARNING_RATE, weight_decay=0.0, smoothing=0.0)


def manifest(task: TaskName, backbone: LoadedBackbone, prompt: PromptRecipe | None) -> Manifest:
    """A task's manifest; without a recipe, that of the bare backbone under the task's own instruction."""
    return Manifest(
        name=task,
        kind=KINDS[task],
        backbone_name=backbone.config.name,
        fingerprint=backbone.fingerprint,
        encoder_length=prompt.encoder_length if prompt else 0,
        decoder_length=prompt.decoder_length if prompt else 0,
        instruction=INSTRUCTIONS[task],
        image=ImageInput(backbone.config.image_size),
        answers={"scene-vqa": vqa_answers(), "scene-entailment": tuple(ENTAILMENT_LABELS)}.get(task),
        labels=ENTAILMENT_LABELS if task == "scene-entailment" else None,
        decoding={"max_length": 32, "no_repeat_ngram": 0} if task == "scene-caption" else {},
    )


class SceneBatches:
    """A task's batches about the first scenes of the data, `seen` by the frozen stem already."""

    def __init__(
        self, task: TaskName, backbone: LoadedBackbone, tokenizer: Tokenizer, data: SceneDataset, seen: Seen
    ) -> None:
        self._task, self._tokenizer, self._data, self._seen = task, tokenizer, data, seen
        described = manifest(task, backbone, PROMPT)
        self._config, self._spec = backbone.config, TaskSpec.from_manifest(described, backbone.config)
        self._answers = None
        if described.answers is not None:
            self._answers = Trie([tokenizer.encode(f" {answer}") for answer in described.answers])

    def take(self, cursor: Cursor) -> tuple[TrainingBatch, Cursor]:
        """Batch number `cursor`: what is in it depends on that number alone."""
        number = cursor if isinstance(cursor, int) else 0
        rng = random.Random(step_recipe(self._task).seed * 1_000_003 + number)
        chosen = [rng.randrange(len(self._seen)) for _ in range(ROWS)]
        examples = []
        for row, index in enumerate(chosen):
            sample = task_sample(self._task, self._data[index][1], rng)
            item = encode_item(self._spec, self._tokenizer, sample.text, None)
            target = part_ids([sample.target], self._tokenizer, self._config)
            examples.append(Example(item.source_ids, (BOS,), target, row))
        return TrainingBatch(examples, [self._seen[index] for index in chosen], self._answers), number + 1


@torch.no_grad()
def stem_once(model: OFA, data: SceneDataset, indices: Sequence[int]) -> list[ImageTokens]:
    """Image tokens of scenes, in order."""
    tokens: list[ImageTokens] = []
    for start in range(0, len(indices), 64):
        pictures = [torch.from_numpy(data[i][0].copy()) for i in indices[start : start + 64]]
        tokens += model.image_tokens(to_pixels(torch.stack(pictures)))
    return tokens


def tune_tasks(
    tasks: Sequence[TaskName],
    backbone: LoadedBackbone,
    model: OFA,
    tokenizer: Tokenizer,
    data: SceneDataset,
    seen: Seen,
) -> dict[TaskName, Prompt]:
    """Tune shipped prompts, all in one batch; their manifests have no score yet."""
    cohort = Cohort()
    for task in tasks:
        begin = Begin(begin_of_texts(model, [(BOS, *tokenizer.encode(BEGIN_TEXTS[task]), EOS)]).encoder)
        recipe = step_recipe(task)
        method = DeepPrompts(model, PROMPT, seed=recipe.seed, begin=begin)
        cohort.join(Run(task, method, recipe, SceneBatches(task, backbone, tokenizer, data, seen)))
    runs = {task: run for task, run in zip(tasks, cohort.runs, strict=True)}
    while cohort.runs:
        advance = cohort.advance()
        for failure in advance.failed:
            raise failure.error
        for report in advance.steps:
            if report.step % LOG_EVERY == 0:
                log.info("%s, step %d: nll %.4f", report.run, report.step, report.nll)
    return {task: _learned(task, run, backbone, len(seen)) for task, run in runs.items()}


def _learned(task: TaskName, run: Run, backbone: LoadedBackbone, pictures: int) -> Prompt:
    provenance = {
        "method": "prompt",
        "steps": run.recipe.steps,
        "rows": ROWS,
        "learning_rate": run.recipe.learning_rate,
        "seed": run.recipe.seed,
        "begun_from": BEGIN_TEXTS[task],
        "data": f"composed scenes 0 to {pictures - 1}, split train",
    }
    tensors = [tensor.to(torch.bfloat16) for tensor in run.saved().values()]
    return Prompt.build(replace(manifest(task, backbone, PROMPT), provenance=provenance), *tensors)


def bare_prompt(task: TaskName, backbone: LoadedBackbone) -> Prompt:
    """The task's instruction on the backbone alone, for comparison."""
    config = backbone.config
    nothing = [torch.zeros(n, config.heads, 0, config.head_dim) for n in (config.encoder_layers, config.decoder_layers)]
    return Prompt.build(manifest(task, backbone, None), nothing[0], nothing[0], nothing[1], nothing[1])


def scored(prompt: Prompt, score: TaskScore) -> Prompt:
    """The prompt with its measured score in the manifest."""
    metric = {"name": score.metric, "value": round(score.value, 4), "n": score.n}
    described = replace(prompt.manifest, metric=metric)
    return Prompt.build(described, prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune and score the shipped prompts of the embedded backbone.")
    parser.add_argument("--backbone", type=Path, default=WEIGHTS)
    parser.add_argument("--train", type=Path, default=Path("var/pocket/train"))
    parser.add_argument("--heldout", type=Path, default=Path("var/pocket/heldout"))
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--scenes", type=int, default=1000, help="held-out scenes to score on")
    parser.add_argument("--out", type=Path, default=Path("prompts/library"))
    parser.add_argument("--task", choices=TASKS, action="append", help="only this task (may be repeated)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    backbone = load_backbone(arguments.backbone)
    model = assemble(backbone, dtype=serving_dtype("cpu"))
    tokenizer = backbone.tokenizer()
    train, heldout = SceneDataset(arguments.train), SceneDataset(arguments.heldout)
    arguments.out.mkdir(parents=True, exist_ok=True)
    seen = stem_once(model, train, range(arguments.pictures))
    prompts = tune_tasks(arguments.task or TASKS, backbone, model, tokenizer, train, seen)
    for task, prompt in prompts.items():
        log.info("%s", task)
        for title, candidate in (("backbone alone", bare_prompt(task, backbone)), ("with its prompt", prompt)):
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, f"{task}.safetensors").write_bytes(write_prompt(candidate))
                score = score_task(
                    task, model, tokenizer, backbone.fingerprint, Path(folder), heldout, arguments.scenes
                )
            log.info("  %s: %s", title, score)
        (arguments.out / f"{task}.safetensors").write_bytes(write_prompt(scored(prompt, score)))


if __name__ == "__main__":
    main()
