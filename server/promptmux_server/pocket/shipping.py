"""From trained prompts to those that are shipped: `python -m promptmux_server.pocket.shipping --help`.

Scores each on its held-out lines, and the bare backbone beside it; writes the score into the manifest, and curve and
scores beside the recipe.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from promptmux_prompts import Prompt, load_prompt, write_prompt
from promptmux_server.backbone.assemble import assemble, serving_dtype
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.pocket import WEIGHTS
from promptmux_server.pocket.recipes import FOLDER, POCKET_TASKS, trained_in
from promptmux_server.pocket.scores import TaskScore, held_out, score
from promptmux_server.training.validation import OpenBackbone

log = logging.getLogger(__name__)


def bare(prompt: Prompt) -> Prompt:
    """The prompt's task, instruction and answers on the backbone alone."""
    manifest = replace(prompt.manifest, encoder_length=0, decoder_length=0, canary=None)
    return Prompt.build(manifest, *(side[:, :, :0] for side in _sides(prompt)))


def scored(prompt: Prompt, score: TaskScore) -> Prompt:
    """The prompt with this score in its manifest, and the digest of what it is then."""
    metric = {"name": score.metric, "value": round(score.value, 4), "n": score.n}
    return Prompt.build(replace(prompt.manifest, metric=metric), *_sides(prompt))


def _sides(prompt: Prompt) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value


def ship(name: str, trained: Path, backbone: OpenBackbone, lines: Path, library: Path, recipes: Path) -> None:
    """Score one task's prompt and put it in its place, with its curve and its scores."""
    loaded = backbone.loaded
    path = trained / name / f"{name}.safetensors"
    prompt = load_prompt(path, shape=loaded.prompt_shape, fingerprint=loaded.fingerprint, dtype=torch.bfloat16)
    asked = held_out(lines / f"{name}.heldout.jsonl", prompt.manifest.kind)
    alone, tuned = score(bare(prompt), backbone, asked), score(prompt, backbone, asked)
    log.info("%s\n  backbone alone: %s\n  with its prompt: %s", name, alone, tuned)
    (library / f"{name}.safetensors").write_bytes(write_prompt(scored(prompt, tuned)))
    shutil.copy(trained / name / "curve.jsonl", recipes / f"{name}.curve.jsonl")
    scores = {"alone": asdict(alone), "prompt": asdict(tuned)}
    (recipes / f"{name}.score.json").write_text(json.dumps(scores, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Score trained prompts on held-out data, and ship them.")
    parser.add_argument("--trained", type=Path, help="folder of trained prompts (default: the shipped backbone's)")
    parser.add_argument("--lines", type=Path, default=Path("var/pocket/tasks"))
    parser.add_argument("--out", type=Path, default=Path("prompts/library"))
    parser.add_argument("--recipes", type=Path, default=FOLDER)
    parser.add_argument("--task", choices=list(POCKET_TASKS), action="append", help="only this task (may be repeated)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    loaded = load_backbone(WEIGHTS)
    backbone = OpenBackbone(loaded, assemble(loaded, dtype=serving_dtype("cpu")), loaded.tokenizer())
    trained = arguments.trained or trained_in(loaded.fingerprint)
    for name in arguments.task or POCKET_TASKS:
        ship(name, trained, backbone, arguments.lines, arguments.out, arguments.recipes)


if __name__ == "__main__":
    main()
