"""Pretraining of `pocket` on composed scenes: `python -m promptmux_server.pocket.pretrain --help`.

Owns the loop, its checkpoints and its log. A run can be killed at any time and started again with the same command; it
goes on from the last checkpoint. The samples come from `mixture`, the numbers from `recipe`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.backbone.vision import channels_last
from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.mixture import to_pixels, training_examples
from promptmux_server.pocket.recipe import NUM_BINS, Recipe, initialise, pocket_config
from promptmux_server.training.forward import Example, supervised_logits
from promptmux_server.training.loss import Loss, label_smoothed_loss

CHECKPOINT_EVERY = 250
LOG_EVERY = 25


def batch_loss(model: OFA, pixels: torch.Tensor, examples: list[Example], smoothing: float) -> Loss:
    """Loss of one batch in bfloat16 mixed precision."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        logits, targets = supervised_logits(model, examples, model.image_tokens(pixels))
    return label_smoothed_loss(logits, targets, smoothing=smoothing)


class Pretraining:
    """Model, optimiser and position of a run; everything that a checkpoint holds."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, stem: Path, folder: Path) -> None:
        self.recipe, self.tokenizer, self.folder = recipe, tokenizer, folder
        self.step = 0
        self.config = pocket_config(tokenizer.text_vocab_size)
        torch.manual_seed(recipe.seed)
        self.model = OFA(self.config, folded=False)
        initialise(self.model)
        self._begin_from(load_file(stem))
        self.model.train()
        channels_last(self.model.encoder.embed_images)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
        )

    def _begin_from(self, lesson: dict[str, torch.Tensor]) -> None:
        """Take the stem's first lesson over: its weights, and its head as the way from features to words.

        The head scores kinds; each kind's score then weighs the embedding of its name. A patch so enters the encoder
        close to the word for what it shows, and naming it is copying.
        """
        head = {name: lesson.pop(name) for name in ("head.weight", "head.bias")}
        encoder = self.model.encoder
        encoder.embed_images.load_state_dict(lesson)
        names = torch.stack([encoder.embed_tokens.weight[self._word(kind)].detach() for kind in KINDS])  # (kinds, d)
        scores, offset = head["head.weight"][: len(KINDS)], head["head.bias"][: len(KINDS)]
        encoder.image_proj.weight.data = names.T @ (scores - scores.mean(0))
        encoder.image_proj.bias.data = names.T @ (offset - offset.mean())

    def _word(self, kind: str) -> int:
        """The token that a kind's name begins with."""
        return self.tokenizer.encode(f" {kind}")[0]

    def restore(self) -> None:
        """Go on from the checkpoint in the folder, if there is one."""
        if not (self.folder / "checkpoint.safetensors").exists():
            return
        tensors = load_file(self.folder / "checkpoint.safetensors")
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model/")})
        state = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                state["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(state)
        self.step = int(json.loads((self.folder / "checkpoint.json").read_text())["step"])

    def save(self) -> None:
        """Write the checkpoint beside the old one and rename, so that a kill never leaves half of it."""
        tensors = {f"model/{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value.contiguous() for key, value in entries.items()}
        temporary = self.folder / "checkpoint.tmp"
        save_file(tensors, temporary)
        temporary.replace(self.folder / "checkpoint.safetensors")
        (self.folder / "checkpoint.json").write_text(json.dumps({"step": self.step}))

    def train_step(self, data: SceneDataset) -> Loss:
        """One step; its samples depend on the seed and the step's number alone, whatever was interrupted before."""
        rng = random.Random(self.recipe.seed * 1_000_003 + self.step)
        chosen = [data[rng.randrange(len(data))] for _ in range(self.recipe.images)]
        pixels = to_pixels(torch.stack([torch.from_numpy(image.copy()) for image, _ in chosen]))
        described = self.step < self.recipe.described_steps
        examples = [
            example
            for index, (_, scene) in enumerate(chosen)
            for example in training_examples(
                scene, index, self.recipe.texts, self.tokenizer, self.config, rng, described=described
            )
        ]
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        loss = batch_loss(self.model, pixels, examples, self.recipe.smoothing)
        loss.mean.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss


def run(recipe: Recipe, tokenizer: Tokenizer, data: SceneDataset, stem: Path, folder: Path) -> Pretraining:
    """Train to the recipe's last step, logging JSON lines to `train.jsonl` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    training = Pretraining(recipe, tokenizer, stem, folder)
    training.restore()
    started, total, tokens = time.monotonic(), 0.0, 0
    with (folder / "train.jsonl").open("a") as log:
        while training.step < recipe.steps:
            loss = training.train_step(data)
            total, tokens = total + float(loss.nll.detach()), tokens + loss.tokens
            if training.step % LOG_EVERY == 0:
                seconds = round(time.monotonic() - started, 1)
                line = {"step": training.step, "nll": round(total / tokens, 4), "seconds": seconds}
                log.write(json.dumps(line) + "\n")
                log.flush()
                total, tokens = 0.0, 0
            if training.step % CHECKPOINT_EVERY == 0 or training.step == recipe.steps:
                training.save()
    return training


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded backbone on composed scenes.")
    parser.add_argument("--data", type=Path, default=Path("var/pocket/train"))
    parser.add_argument("--tokenizer", type=Path, default=Path("var/pocket/tokenizer"))
    parser.add_argument("--stem", type=Path, default=Path("var/pocket/stem.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("var/pocket/run"))
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps)
    tokenizer = Tokenizer.load(arguments.tokenizer, num_codes=0, num_bins=NUM_BINS)
    run(recipe, tokenizer, SceneDataset(arguments.data), arguments.stem, arguments.out)


if __name__ == "__main__":
    main()
