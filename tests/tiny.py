"""A tiny random backbone and prompts for it: real code, no weights, milliseconds."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch

from promptmux_prompts import ImageInput, Kind, Manifest, Prompt, PromptShape, Store, write_prompt
from promptmux_prompts.disk import Disk
from promptmux_server.backbone.assemble import assemble
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer, train_tokenizer
from promptmux_server.backbone.weights import LoadedBackbone
from promptmux_server.backbone.weights.random_init import random_backbone
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.options import EngineOptions

WORDS = "the a dog cat bird is left of right red blue what how many are there yes no maybe one two where in picture"
BINS = 32


@cache
def tokenizer() -> Tokenizer:
    corpus = [f" {word}" for word in WORDS.split()] * 4
    return train_tokenizer(corpus, 400, num_bins=BINS)


@cache
def config() -> BackboneConfig:
    return BackboneConfig(
        name="tiny",
        vocab_size=tokenizer().text_vocab_size + BINS,
        d_model=64,
        ffn_dim=96,
        heads=2,
        encoder_layers=2,
        decoder_layers=3,
        resnet_blocks=(1, 1, 1),
        resnet_width=8,
        image_bucket_size=8,
        token_bucket_size=16,
        max_positions=128,
        num_codes=0,
        num_bins=BINS,
        max_image_size=64,
        image_size=64,
        dropout=0.0,
    )


@cache
def backbone() -> LoadedBackbone:
    tensors = random_backbone(config(), seed=3, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    # Larger weights than at initialisation, so that outputs depend visibly on every input.
    tensors = {n: t * 4 if t.ndim == 2 else t for n, t in tensors.items()}
    for name, tensor in tensors.items():
        if name.endswith(("bn1.bias", "bn2.bias", "bn3.bias", "layer_norm.bias")):
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.1
    return LoadedBackbone(config(), tensors)


@cache
def model() -> OFA:
    return assemble(backbone(), dtype=torch.float32)


def shape() -> PromptShape:
    c = config()
    return PromptShape(c.encoder_layers, c.decoder_layers, c.heads, c.head_dim)


def prompt(
    name: str = "tiny-task",
    *,
    kind: Kind = "text",
    encoder_length: int = 4,
    decoder_length: int = 3,
    seed: int = 0,
    image_size: int | None = 64,
    scale: float = 1.0,
    **manifest: object,
) -> Prompt:
    c = config()
    fields: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "backbone_name": c.name,
        "fingerprint": backbone().fingerprint,
        "encoder_length": encoder_length,
        "decoder_length": decoder_length,
        "instruction": " {text}",
        "image": ImageInput(image_size) if image_size else None,
    }
    described = Manifest(**{**fields, **manifest})
    generator = torch.Generator().manual_seed(seed)

    def draw(layers: int, length: int, present: tuple[int, int] | None) -> torch.Tensor:
        drawn = torch.randn(layers, c.heads, length, c.head_dim, generator=generator) * scale
        if present is not None:
            drawn[: present[0]], drawn[present[1] :] = 0.0, 0.0
        return drawn

    return Prompt.build(
        described,
        draw(c.encoder_layers, encoder_length, described.encoder_layers),
        draw(c.encoder_layers, encoder_length, described.encoder_layers),
        draw(c.decoder_layers, decoder_length, described.decoder_layers),
        draw(c.decoder_layers, decoder_length, described.decoder_layers),
    )


class UnsyncedDisk(Disk):
    """Saves the milliseconds of every sync: tests that cut no power need none."""

    def sync(self, file: int) -> None:
        pass

    def sync_folder(self, place: str) -> None:
        pass


def engine(folder: Path, options: EngineOptions | None = None) -> Engine:
    """An engine over a directory of prompt files, not started; its registry lies in the folder `registry` there."""
    root = folder / "registry"
    store = Store.open(root, max_names=10_000, disk=UnsyncedDisk(root.resolve()))
    return Engine(model(), tokenizer(), backbone().fingerprint, store, options, seeds=folder)


def write(folder: Path, *prompts: Prompt) -> Path:
    """Put prompt files into a directory and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in prompts:
        (folder / f"{item.manifest.name}.safetensors").write_bytes(write_prompt(item))
    return folder


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS.split()) for _ in range(words))
