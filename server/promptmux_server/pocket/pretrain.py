"""Pretraining of `pocket` on composed scenes: `python -m promptmux_server.pocket.pretrain --help`.

Owns the loop, its checkpoints and its log. A run can be killed at any time and started again with the same command; it
goes on from the last checkpoint. `torchrun --nproc-per-node 2 -m ...` learns in two processes. The samples come from
`mixture`, the numbers from `recipe`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from promptmux_server.backbone.assemble import serving_dtype
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.backbone.vision import channels_last
from promptmux_server.backbone.weights import LoadedBackbone, load_backbone
from promptmux_server.pocket import checkpoints
from promptmux_server.pocket.averaging import processes, take_mean
from promptmux_server.pocket.colours import TINTS
from promptmux_server.pocket.dataset import SceneDataset
from promptmux_server.pocket.losses import text_loss
from promptmux_server.pocket.mentions import MentionHead, Named, Names
from promptmux_server.pocket.mixture import to_pixels, training_examples
from promptmux_server.pocket.patches import (
    ANSWERS,
    EDGE_ANSWERS,
    EDGE_BINS,
    GRID,
    TINT_ANSWERS,
    WORD_ANSWERS,
    WORDS,
)
from promptmux_server.pocket.recipe import NUM_BINS, STEM, Recipe, initialise, pocket_config
from promptmux_server.pocket.scenes import Scene
from promptmux_server.pocket.sights import SightHead
from promptmux_server.pocket.vocabulary import carried_over
from promptmux_server.training.curve import Curve
from promptmux_server.training.forward import Example
from promptmux_server.training.loss import Loss

TOLD_WEIGH = 0.3
"""Of what the encoder is told of named things, and of patches, beside the mean loss of the texts."""
CHECKPOINT = "checkpoint.safetensors"
LOG = "train.jsonl"
AVERAGE_EVERY = 50
CHECKPOINT_EVERY = 250
"""Right after a mean is taken, where all processes stand at one place."""
LOG_EVERY = 25


class Pretraining:
    """Model, optimiser and position of a run; everything that a checkpoint holds.

    It begins with the stem that the stem's lesson leaves in a file, and with all else of a backbone directory, or new.
    The stem stays as it was taught: texts pull it away from what it knows faster than they teach it (docs/log.md).
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, lesson: Path, begin: Path | None, folder: Path) -> None:
        self.recipe, self.tokenizer, self.folder = recipe, tokenizer, folder
        self.step = 0
        self.config = pocket_config(tokenizer.text_vocab_size)
        torch.manual_seed(recipe.seed)
        self.model = OFA(self.config, folded=False)
        initialise(self.model)
        if begin is not None:
            self._go_on_from(load_backbone(begin))
        self._let_patches_say(self._take_over(load_file(lesson)), new=begin is None)
        self.mentions, self.names = MentionHead(self.model), Names(tokenizer)
        self.sights = SightHead(self.model)
        self.model.train()
        stem = self.model.encoder.embed_images.eval().requires_grad_(False)
        channels_last(stem)
        everything = [p for module in self._modules.values() for p in module.parameters()]
        trained = [parameter for parameter in everything if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
        )

    def _go_on_from(self, backbone: LoadedBackbone) -> None:
        """Take a backbone over, all but its stem, its words carried to this run's vocabulary."""
        tensors = {name: tensor.float() for name, tensor in backbone.tensors.items() if not name.startswith(STEM)}
        tensors |= {name: tensor for name, tensor in self.model.state_dict().items() if name.startswith(STEM)}
        rows = tensors["encoder.embed_tokens.weight"]
        tensors["encoder.embed_tokens.weight"] = carried_over(rows, backbone.tokenizer(), self.tokenizer)
        self.model.load_state_dict(tensors)

    def _take_over(self, lesson: dict[str, Tensor]) -> nn.Linear:
        """The stem of a lesson, and the head that reads the lesson's answers from it."""
        head = nn.Linear(self.config.image_feature_dim, ANSWERS)
        head.load_state_dict({name: lesson.pop(f"head.{name}") for name in ("weight", "bias")})
        self.model.encoder.embed_images.load_state_dict(lesson)
        return head

    @torch.no_grad()
    def _let_patches_say(self, head: nn.Linear, *, new: bool) -> None:
        """Let patches enter the encoder close to the words and places that the lesson's head reads from them.

        Naming what is there is then copying. A backbone that is not new hears it half as loud as what its patches said
        before: trained behind a stem that was blind to something, it would go on ignoring it (docs/log.md).
        """
        projection, voice = self.model.encoder.image_proj, self._voice()
        reading, offset = voice @ head.weight, voice @ head.bias  # (d, C), (d,)
        if new:
            projection.weight.zero_()
            projection.bias.zero_()
        loudness = 1.0 if new else float(0.5 * projection.weight.norm() / reading.norm())
        projection.weight.add_(loudness * reading)
        projection.bias.add_(loudness * offset)

    @torch.no_grad()
    def _voice(self) -> torch.Tensor:
        """Directions (d, ANSWERS) in which the lesson's answers are said: words and tints as their embeddings, less
        their means, and each edge as waves over its bins, so that near bins sound alike."""
        embeddings = self.model.encoder.embed_tokens.weight
        voice = torch.zeros(self.config.d_model, ANSWERS)
        for names, answers in ((WORDS, WORD_ANSWERS), (tuple(TINTS), TINT_ANSWERS)):
            said = torch.stack([embeddings[self._token(name)] for name in names], 1)
            voice[:, answers] = said - said.mean(1, keepdim=True)
        bins = torch.arange(EDGE_BINS) / EDGE_BINS
        waves = torch.cat([wave(torch.pi * k * bins)[None] for k in (1, 2, 4) for wave in (torch.cos, torch.sin)])
        mixing = torch.randn(4, self.config.d_model, len(waves), generator=torch.Generator().manual_seed(0))
        places = torch.cat([side @ waves for side in mixing], 1)  # (d, 4 * EDGE_BINS)
        places = places - places.mean(1, keepdim=True)
        voice[:, EDGE_ANSWERS] = places * (voice[:, WORD_ANSWERS].std() / places.std())
        return voice

    def _token(self, word: str) -> int:
        """The token that a word begins with."""
        return self.tokenizer.encode(f" {word}")[0]

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "mentions": self.mentions, "sights": self.sights}

    def restore(self) -> None:
        """Go on from the checkpoint in the folder, if there is one."""
        self.step = checkpoints.restore(self.folder / CHECKPOINT, self._modules, self.optimizer)

    def save(self) -> None:
        checkpoints.save(self.folder / CHECKPOINT, self.step, self._modules, self.optimizer)

    def train_step(self, data: SceneDataset, number: int = 0) -> Loss:
        """One step; its samples depend on the seed, the step and the process's number alone, whatever was interrupted
        before."""
        rng = random.Random((self.recipe.seed + number) * 1_000_003 + self.step)
        chosen = [data[rng.randrange(len(data))] for _ in range(self.recipe.images)]
        pixels = to_pixels(torch.stack([torch.from_numpy(image.copy()) for image, _ in chosen]))
        examples = [
            example
            for index, (_, scene) in enumerate(chosen)
            for example in training_examples(scene, index, self.recipe.texts, self.tokenizer, self.config, rng)
        ]
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        encoder = self.model.encoder
        with torch.autocast("cpu", torch.bfloat16, enabled=serving_dtype("cpu") is torch.bfloat16):
            with torch.no_grad():
                features = encoder.embed_images(pixels.contiguous(memory_format=torch.channels_last))
            images = encoder.project(features.flatten(2).transpose(1, 2), (GRID, GRID))
            loss = text_loss(self.model, images, examples)
            scenes = [scene for _, scene in chosen]
            told = self.mentions.loss(self._named(examples, scenes)) + self.sights.loss(self._seen(examples, scenes))
        (loss.mean + TOLD_WEIGH * told).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    def _named(self, examples: list[Example], scenes: list[Scene]) -> list[Named]:
        """All names of things in the texts, by their places on the encoder's flat axis."""
        named: list[Named] = []
        for start, image, source in _on_the_axis(examples):
            before = None
            for mention in self.names.mentions(source):
                named.append(Named(start + GRID * GRID + mention.place, mention.kind, scenes[image], before))
                before = mention.kind
        return named

    def _seen(self, examples: list[Example], scenes: list[Scene]) -> list[tuple[int, Scene]]:
        """Each scene with the place of its first text's patches on the encoder's flat axis."""
        places: dict[int, int] = {}
        for start, image, _ in _on_the_axis(examples):
            places.setdefault(image, start)
        return [(place, scenes[image]) for image, place in places.items()]


def _on_the_axis(examples: list[Example]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(start on the encoder's flat axis, picture, text) of each example: a picture's patches come before its text."""
    start = 0
    for example in examples:
        assert example.image is not None
        yield start, example.image, example.source
        start += GRID * GRID + len(example.source)


def run(training: Pretraining, data: SceneDataset, number: int = 0, count: int = 1) -> None:
    """Train to the recipe's last step as process `number` of `count`; the first writes
    the log, JSON lines, and the checkpoints."""
    recipe, folder = training.recipe, training.folder
    folder.mkdir(parents=True, exist_ok=True)
    training.restore()
    if number == 0:
        Curve(folder / LOG).go_back(training.step)
    started, total, tokens = time.monotonic(), 0.0, 0
    while training.step < recipe.steps:
        loss = training.train_step(data, number)
        total, tokens = total + float(loss.nll.detach()), tokens + loss.tokens
        last = training.step == recipe.steps
        if count > 1 and (training.step % AVERAGE_EVERY == 0 or last):
            take_mean(training.optimizer)
        if number > 0:
            continue
        if training.step % LOG_EVERY == 0:
            seconds = round(time.monotonic() - started, 1)
            with (folder / LOG).open("a") as log:
                log.write(
                    json.dumps({"step": training.step, "loss": round(total / tokens, 4), "seconds": seconds}) + "\n"
                )
            total, tokens = 0.0, 0
        if training.step % CHECKPOINT_EVERY == 0 or last:
            training.save()


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded backbone on composed scenes.")
    parser.add_argument("--data", type=Path, default=Path("var/pocket/train"))
    parser.add_argument("--tokenizer", type=Path, default=Path("var/pocket/tokenizer"))
    parser.add_argument(
        "--lesson", type=Path, default=Path("var/pocket/stem.safetensors"), help="what the stem's lesson left"
    )
    parser.add_argument("--begin", type=Path, help="a backbone directory to go on from, all but its stem")
    parser.add_argument("--out", type=Path, default=Path("var/pocket/run"))
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--learning-rate", type=float, default=Recipe().learning_rate)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    # float32 products through oneDNN: MKL is 15 % slower on CPUs that are not Intel's.
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(arguments.threads)
    tokenizer = Tokenizer.load(arguments.tokenizer, num_codes=0, num_bins=NUM_BINS)
    recipe = Recipe(steps=arguments.steps, learning_rate=arguments.learning_rate)
    training = Pretraining(recipe, tokenizer, arguments.lesson, arguments.begin, arguments.out)
    with processes() as (number, count):
        run(training, SceneDataset(arguments.data), number, count)


if __name__ == "__main__":
    main()
