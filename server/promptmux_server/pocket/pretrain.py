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
from torch import nn

from promptmux_server.backbone.assemble import serving_dtype
from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.backbone.vision import channels_last
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.mixture import to_pixels, training_examples
from promptmux_server.pocket.recipe import NUM_BINS, Recipe, initialise, pocket_config
from promptmux_server.pocket.stem import ANSWERS, GRID, WORDS, lesson_losses, patch_truth
from promptmux_server.training.forward import Example, supervised_logits
from promptmux_server.training.loss import Loss, label_smoothed_loss

CHECKPOINT_EVERY = 250
LOG_EVERY = 25


def text_loss(model: OFA, images: list[ImageTokens], examples: list[Example], smoothing: float) -> Loss:
    """Loss of a batch's texts.

    A token of a target with n tokens weighs n ** -0.5: unweighted, lists of boxes drown the answers of one word, which
    were then a twentieth of all tokens and the last to be learnt.
    """
    logits, targets = supervised_logits(model, examples, images)
    lengths = torch.tensor([len(example.target) + 1 for example in examples], device=logits.device)
    weights = lengths.float().rsqrt().repeat_interleave(lengths)  # (T,)
    return label_smoothed_loss(logits, targets, smoothing=smoothing, confidence=weights)


class Pretraining:
    """Model, optimiser and position of a run; everything that a checkpoint holds.

    It begins from a backbone directory, or from the file that the stem's first lesson leaves.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, begin: Path, folder: Path) -> None:
        self.recipe, self.tokenizer, self.folder = recipe, tokenizer, folder
        self.step = 0
        self.config = pocket_config(tokenizer.text_vocab_size)
        torch.manual_seed(recipe.seed)
        self.model = OFA(self.config, folded=False)
        self.head = nn.Linear(self.config.image_feature_dim, ANSWERS)
        initialise(self.model)
        if begin.is_dir():
            self.model.load_state_dict({n: t.float() for n, t in load_backbone(begin).tensors.items()})
        else:
            self._begin_from(load_file(begin))
        self.model.train()
        channels_last(self.model.encoder.embed_images)
        trained = [*self.model.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
        )

    def _begin_from(self, lesson: dict[str, torch.Tensor]) -> None:
        """Take the stem's first lesson over: its weights, and its head as the way from features to words.

        The head scores words; each word's score then weighs its embedding. A patch so enters the encoder close to the
        word for what it shows, and naming it is copying.
        """
        self.head.load_state_dict({name: lesson.pop(f"head.{name}") for name in ("weight", "bias")})
        encoder = self.model.encoder
        encoder.embed_images.load_state_dict(lesson)
        names = torch.stack([encoder.embed_tokens.weight[self._token(word)].detach() for word in WORDS])  # (words, d)
        scores, offset = (p.detach()[: len(WORDS)] for p in (self.head.weight, self.head.bias))
        encoder.image_proj.weight.data = names.T @ (scores - scores.mean(0))
        encoder.image_proj.bias.data = names.T @ (offset - offset.mean())

    @torch.no_grad()
    def name_colours(self, features: torch.Tensor) -> None:
        """Let patches of background enter the encoder close to the word for their colour (features (B, N, C)).

        A transformer that was trained on a stem blind to colours goes on ignoring them: 500 steps after the stem could
        name 97 % of the background's patches, the answer to every question about it was still the same word. What is
        added is half as loud as what the projection says already.
        """
        projection, colours = self.model.encoder.image_proj, slice(len(KINDS), len(WORDS))
        names = torch.stack([self.model.encoder.embed_tokens.weight[self._token(word)] for word in WORDS[colours]])
        names = names - names.mean(0)
        reading = names.T @ self.head.weight[colours]  # (d, C)
        loudness = 0.5 * projection(features).std() / (features @ reading.T).std()
        projection.weight.add_(loudness * reading)
        projection.bias.add_(loudness * names.T @ self.head.bias[colours])

    def _token(self, word: str) -> int:
        """The token that a word begins with."""
        return self.tokenizer.encode(f" {word}")[0]

    def restore(self) -> None:
        """Go on from the checkpoint in the folder, if there is one."""
        if not (self.folder / "checkpoint.safetensors").exists():
            return
        tensors = load_file(self.folder / "checkpoint.safetensors")
        self.model.load_state_dict(_under("model/", tensors))
        self.head.load_state_dict(_under("head/", tensors))
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
        tensors |= {f"head/{k}": v for k, v in self.head.state_dict().items()}
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
        encoder = self.model.encoder
        with torch.autocast("cpu", torch.bfloat16, enabled=serving_dtype("cpu") is torch.bfloat16):
            features = encoder.embed_images(pixels.contiguous(memory_format=torch.channels_last))
            features = features.flatten(2).transpose(1, 2)  # (B, N, C)
            if self.step == self.recipe.colours_step:
                self.name_colours(features.detach().float())
            loss = text_loss(self.model, encoder.project(features, (GRID, GRID)), examples, self.recipe.smoothing)
            answers = self.head(features).float()
        lesson = sum(lesson_losses(answers, [patch_truth(scene) for _, scene in chosen]), start=torch.zeros(()))
        (loss.mean + self.recipe.lesson_weight * lesson).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def run(training: Pretraining, data: SceneDataset) -> None:
    """Train to the recipe's last step, logging JSON lines to `train.jsonl` in the folder."""
    recipe, folder = training.recipe, training.folder
    folder.mkdir(parents=True, exist_ok=True)
    training.restore()
    started, total, tokens = time.monotonic(), 0.0, 0
    with (folder / "train.jsonl").open("a") as log:
        while training.step < recipe.steps:
            loss = training.train_step(data)
            total, tokens = total + float(loss.nll.detach()), tokens + loss.tokens
            if training.step % LOG_EVERY == 0:
                seconds = round(time.monotonic() - started, 1)
                line = {"step": training.step, "loss": round(total / tokens, 4), "seconds": seconds}
                log.write(json.dumps(line) + "\n")
                log.flush()
                total, tokens = 0.0, 0
            if training.step % CHECKPOINT_EVERY == 0 or training.step == recipe.steps:
                training.save()


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded backbone on composed scenes.")
    parser.add_argument("--data", type=Path, default=Path("var/pocket/train"))
    parser.add_argument("--tokenizer", type=Path, default=Path("var/pocket/tokenizer"))
    parser.add_argument(
        "--begin",
        type=Path,
        default=Path("var/pocket/stem.safetensors"),
        help="the stem's first lesson, or a backbone directory to go on from (give its tokenizer, too)",
    )
    parser.add_argument("--out", type=Path, default=Path("var/pocket/run"))
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    arguments = parser.parse_args()
    # float32 products through oneDNN: MKL is 15 % slower on CPUs that are not Intel's.
    torch.set_float32_matmul_precision("medium")
    tokenizer = Tokenizer.load(arguments.tokenizer, num_codes=0, num_bins=NUM_BINS)
    training = Pretraining(Recipe(steps=arguments.steps), tokenizer, arguments.begin, arguments.out)
    run(training, SceneDataset(arguments.data))


if __name__ == "__main__":
    main()
