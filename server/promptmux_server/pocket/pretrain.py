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
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.features import stem_features
from promptmux_server.pocket.mixture import training_examples
from promptmux_server.pocket.recipe import NUM_BINS, Recipe, begin_by_matching, initialise, place_waves, pocket_config
from promptmux_server.pocket.scenes import SIDE
from promptmux_server.pocket.stem import ANSWERS, EDGE_BINS, GRID, WORDS
from promptmux_server.training.forward import Example, supervised_logits
from promptmux_server.training.loss import Loss, label_smoothed_loss

CHECKPOINT_EVERY = 250
LOG_EVERY = 25


def batch_loss(model: OFA, features: torch.Tensor, examples: list[Example], smoothing: float) -> Loss:
    """Loss of one batch about pictures seen already (B, N, C), in bfloat16 mixed precision where the device has it.

    A token of a target with n tokens weighs n ** -0.5: unweighted, lists of boxes drown the answers of one word, which
    were then a twentieth of all tokens and the last to be learnt.
    """
    with torch.autocast(features.device.type, torch.bfloat16, enabled=serving_dtype(features.device) is torch.bfloat16):
        images = model.encoder.project(features, (GRID, GRID))
        logits, targets = supervised_logits(model, examples, images)
    lengths = torch.tensor([len(example.target) + 1 for example in examples], device=logits.device)
    weights = lengths.float().rsqrt().repeat_interleave(lengths)  # (T,)
    return label_smoothed_loss(logits, targets, smoothing=smoothing, confidence=weights)


class Pretraining:
    """Model, optimiser and position of a run; everything that a checkpoint holds. The stem stays as it was taught."""

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, lesson: Path, data: SceneDataset, pictures: int, folder: Path
    ) -> None:
        self.recipe, self.tokenizer, self.data, self.folder = recipe, tokenizer, data, folder
        self.step = 0
        self.config = pocket_config(tokenizer.text_vocab_size)
        torch.manual_seed(recipe.seed)
        self.model = OFA(self.config, folded=False)
        initialise(self.model)
        begin_by_matching(self.model)
        self.model.train()
        tensors = load_file(lesson)
        head = {name: tensors.pop(name) for name in ("head.weight", "head.bias")}
        stem = self.model.encoder.embed_images
        stem.load_state_dict(tensors)
        stem.requires_grad_(False)
        self.features = stem_features(stem, data, pictures, lesson.with_name("features.npy"))
        self._read_lesson(head["head.weight"], head["head.bias"])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
        )

    def _read_lesson(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Begin the image projection as a reading of the lesson's answers (weight (answers, C), bias (answers,)).

        Each word's score weighs the word's embedding, each edge's scores the waves of their places (turned by a matrix
        of the edge's own), the centre's score a vector: a patch enters the encoder close to the word for what it shows
        and to the symbols for where it is, so naming and pointing are copying. The three parts start equally loud.
        """
        width = self.config.d_model
        names = self.model.encoder.embed_tokens.weight.data[[self._token(word) for word in WORDS]]  # (words, d)
        places = place_waves((torch.arange(EDGE_BINS) + 0.5) * SIDE / EDGE_BINS, width)  # (bins, d)
        turned = [places @ nn.init.orthogonal_(torch.empty(width, width)) for _ in range(4)]
        sample = torch.from_numpy(self.features[:500].astype("float32")).flatten(0, 1)
        total_weight, total_bias = torch.zeros(width, weight.shape[1]), torch.zeros(width)
        first = 0
        for directions in (names, torch.cat(turned), torch.randn(1, width)):
            part = slice(first, first + len(directions))
            first = part.stop
            reading, offset = directions.T @ weight[part], directions.T @ bias[part]
            heard = sample @ reading.T + offset
            loudness = heard.std(0).mean()
            total_weight += reading / loudness
            total_bias += (offset - heard.mean(0)) / loudness
        assert first == ANSWERS
        self.model.encoder.image_proj.weight.data.copy_(total_weight)
        self.model.encoder.image_proj.bias.data.copy_(total_bias)

    def _token(self, word: str) -> int:
        """The token that a word begins with."""
        return self.tokenizer.encode(f" {word}")[0]

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

    def train_step(self) -> Loss:
        """One step; its samples depend on the seed and the step's number alone, whatever was interrupted before."""
        rng = random.Random(self.recipe.seed * 1_000_003 + self.step)
        chosen = [rng.randrange(len(self.features)) for _ in range(self.recipe.images)]
        features = torch.from_numpy(self.features[chosen]).to(self.model.device, torch.float32)
        described = self.step < self.recipe.described_steps
        examples = [
            example
            for image, index in enumerate(chosen)
            for example in training_examples(
                self.data[index][1], image, self.recipe.texts, self.tokenizer, self.config, rng, described=described
            )
        ]
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        loss = batch_loss(self.model, features, examples, self.recipe.smoothing)
        loss.mean.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss


def run(training: Pretraining) -> None:
    """Train to the recipe's last step, logging JSON lines to `train.jsonl` in the folder."""
    recipe, folder = training.recipe, training.folder
    folder.mkdir(parents=True, exist_ok=True)
    training.restore()
    started, total, tokens = time.monotonic(), 0.0, 0
    with (folder / "train.jsonl").open("a") as log:
        while training.step < recipe.steps:
            loss = training.train_step()
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
    parser.add_argument("--stem", type=Path, default=Path("var/pocket/stem.safetensors"))
    parser.add_argument("--pictures", type=int, default=30_000, help="how many training pictures to use")
    parser.add_argument("--out", type=Path, default=Path("var/pocket/run"))
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    arguments = parser.parse_args()
    # float32 products through oneDNN: MKL is 15 % slower on CPUs that are not Intel's.
    torch.set_float32_matmul_precision("medium")
    tokenizer = Tokenizer.load(arguments.tokenizer, num_codes=0, num_bins=NUM_BINS)
    data = SceneDataset(arguments.data)
    run(Pretraining(Recipe(steps=arguments.steps), tokenizer, arguments.stem, data, arguments.pictures, arguments.out))


if __name__ == "__main__":
    main()
