"""The four shipped prompts: their manifests, their training data, and the command that makes them.

`python -m promptmux_server.pocket.library --help` tunes, scores on held-out scenes and writes `prompts/library`.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
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
from promptmux_server.training.forward import Example
from promptmux_server.training.tuner import TuningBatch, TuningRecipe, tune

log = logging.getLogger(__name__)

KINDS: dict[TaskName, Kind] = {
    "scene-caption": "caption",
    "scene-vqa": "answer",
    "scene-entailment": "label",
    "scene-grounding": "box",
}
RECIPES: dict[TaskName, TuningRecipe] = {
    "scene-caption": TuningRecipe(steps=600),
    "scene-vqa": TuningRecipe(steps=1600),
    "scene-entailment": TuningRecipe(steps=700),
    "scene-grounding": TuningRecipe(steps=1600),
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


def manifest(task: TaskName, backbone: LoadedBackbone, recipe: TuningRecipe | None) -> Manifest:
    """A task's manifest; without a recipe, that of the bare backbone under the task's own instruction."""
    return Manifest(
        name=task,
        kind=KINDS[task],
        backbone_name=backbone.config.name,
        fingerprint=backbone.fingerprint,
        encoder_length=recipe.encoder_length if recipe else 0,
        decoder_length=recipe.decoder_length if recipe else 0,
        instruction=INSTRUCTIONS[task],
        image=ImageInput(backbone.config.image_size),
        answers={"scene-vqa": vqa_answers(), "scene-entailment": tuple(ENTAILMENT_LABELS)}.get(task),
        labels=ENTAILMENT_LABELS if task == "scene-entailment" else None,
        decoding={"max_length": 32, "no_repeat_ngram": 0} if task == "scene-caption" else {},
    )


def batches(
    task: TaskName, model: OFA, tokenizer: Tokenizer, spec: TaskSpec, data: SceneDataset, seen: Sequence[ImageTokens]
) -> Iterator[TuningBatch]:
    """Endless batches about the first scenes of the data, `seen` by the frozen stem already."""
    rng = random.Random(RECIPES[task].seed)
    answers = None
    if spec.manifest.answers is not None:
        answers = Trie([tokenizer.encode(f" {answer}") for answer in spec.manifest.answers])
    while True:
        chosen = [rng.randrange(len(seen)) for _ in range(ROWS)]
        examples = []
        for row, index in enumerate(chosen):
            sample = task_sample(task, data[index][1], rng)
            item = encode_item(spec, tokenizer, sample.text, None)
            target = part_ids([sample.target], tokenizer, model.config)
            examples.append(Example(item.source_ids, (BOS,), target, row))
        yield TuningBatch(examples, [seen[index] for index in chosen], answers)


@torch.no_grad()
def stem_once(model: OFA, data: SceneDataset, indices: Sequence[int]) -> list[ImageTokens]:
    """Image tokens of scenes, in order."""
    tokens: list[ImageTokens] = []
    for start in range(0, len(indices), 64):
        pictures = [torch.from_numpy(data[i][0].copy()) for i in indices[start : start + 64]]
        tokens += model.image_tokens(to_pixels(torch.stack(pictures)))
    return tokens


def tune_task(
    task: TaskName,
    backbone: LoadedBackbone,
    model: OFA,
    tokenizer: Tokenizer,
    data: SceneDataset,
    seen: Sequence[ImageTokens],
) -> Prompt:
    """Tune one shipped prompt; its manifest has no score yet."""
    recipe = RECIPES[task]
    described = manifest(task, backbone, recipe)
    spec = TaskSpec.from_manifest(described, backbone.config)
    begin = (BOS, *tokenizer.encode(BEGIN_TEXTS[task]), EOS)
    tables = tune(model, recipe, batches(task, model, tokenizer, spec, data, seen), begin)
    provenance = {
        "method": "prompt",
        "steps": recipe.steps,
        "rows": ROWS,
        "learning_rate": recipe.learning_rate,
        "seed": recipe.seed,
        "begun_from": BEGIN_TEXTS[task],
        "data": f"composed scenes 0 to {len(seen) - 1}, split train",
    }
    with torch.no_grad():
        encoder, decoder = tables.sides()
    tensors = [tensor.to(torch.bfloat16).contiguous() for tensor in (*encoder, *decoder)]
    return Prompt.build(replace(described, provenance=provenance), *tensors)


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
    for task in arguments.task or TASKS:
        log.info("%s", task)
        prompt = tune_task(task, backbone, model, tokenizer, train, seen)
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
