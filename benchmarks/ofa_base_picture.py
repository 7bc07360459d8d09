"""How long a picture takes on OFA-base: random weights, 480 px, bfloat16, through loader, engine and searches.

`python benchmarks/ofa_base_picture.py` writes a transformers-format directory, loads it as a user's would be loaded,
and prints one line of JSON. Absolute times are of the machine they were taken on.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

from lines import write_line
from promptmux_prompts import ImageInput, Manifest, Prompt, write_prompt
from promptmux_server.backbone.assemble import assemble, serving_dtype
from promptmux_server.backbone.config import RESNET_BLOCKS, BackboneConfig
from promptmux_server.backbone.images import from_array
from promptmux_server.backbone.sizes import OFA_SIZES
from promptmux_server.backbone.tokenizer import SPECIALS, Tokenizer
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.backbone.weights.random_init import random_backbone
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.offline import engine_over
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.request import Answer, Request


def placeholder_tokenizer(config: BackboneConfig) -> Tokenizer:
    """A vocabulary of the released size: every byte, and words that no text becomes, since nothing is merged."""
    symbols = [*SPECIALS, *sorted(ByteLevel.alphabet())]
    symbols += [f"word{i}" for i in range(len(symbols), config.text_vocab_size)]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return Tokenizer(vocab, [], num_codes=config.num_codes, num_bins=config.num_bins)


RENAMES = (
    ("encoder.layers", ".attn_ln.", ".self_attn_mid_layer_norm."),
    ("decoder.layers", ".self_attn_ln.", ".self_attn_mid_layer_norm."),
    ("decoder.layers", ".cross_attn_ln.", ".cross_attn_mid_layer_norm."),
    ("decoder.layers", ".encoder_attn_layer_norm.", ".cross_attn_layer_norm."),
    ("decoder.layers", ".encoder_attn.", ".cross_attn."),
    ("", ".ffn_layernorm.", ".ffn_layer_norm."),
)


def write_transformers_directory(directory: Path, config: BackboneConfig) -> None:
    """What a hub repository of this size holds: config.json, pytorch_model.bin with three embeddings, a tokenizer."""
    directory.mkdir()
    resnet = next(name for name, blocks in RESNET_BLOCKS.items() if blocks == config.resnet_blocks)
    described = {
        "model_type": "ofa",
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "encoder_ffn_dim": config.ffn_dim,
        "encoder_attention_heads": config.heads,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "resnet_type": resnet,
    }
    (directory / "config.json").write_text(json.dumps(described))
    tensors = {}
    for name, tensor in random_backbone(config, seed=0, dtype=torch.float32).items():
        for prefix, ours, theirs in RENAMES:
            name = name.replace(ours, theirs) if name.startswith(prefix) else name
        tensors[name] = tensor
    for copy in ("decoder.embed_tokens.weight", "decoder.output_projection.weight"):
        tensors[copy] = tensors["encoder.embed_tokens.weight"].clone()
    torch.save(tensors, directory / "pytorch_model.bin")
    placeholder_tokenizer(config).save(directory)


def caption_prompt(config: BackboneConfig, fingerprint: str, length: int) -> Prompt:
    generator = torch.Generator().manual_seed(1)

    def draw(layers: int) -> torch.Tensor:
        return torch.randn(layers, config.heads, length, config.head_dim, generator=generator) * 0.02

    manifest = Manifest(
        name="caption",
        kind="caption",
        backbone_name=config.name,
        fingerprint=fingerprint,
        encoder_length=length,
        decoder_length=length,
        instruction=" {text}",
        image=ImageInput(480),
    )
    sides = [
        draw(n) for n in (config.encoder_layers, config.encoder_layers, config.decoder_layers, config.decoder_layers)
    ]
    return Prompt.build(manifest, *sides)


def ask(engine: Engine, count: int) -> list[Answer]:
    pictures = [np.random.default_rng(i).integers(0, 256, (480, 640, 3), dtype=np.uint8) for i in range(count)]
    requests = [
        Request(request_id=str(i), task="caption", text="w10 w11", image=from_array(p), deadline=time.monotonic() + 600)
        for i, p in enumerate(pictures)
    ]
    return [future.result() for future in [engine.submit(request) for request in requests]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=OFA_SIZES, default="base")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-length", type=int, default=64)
    arguments = parser.parse_args()
    config = OFA_SIZES[arguments.size]
    with tempfile.TemporaryDirectory() as folder:
        directory, prompts = Path(folder, "backbone"), Path(folder, "prompts")
        write_transformers_directory(directory, config)
        started = time.monotonic()
        backbone = load_backbone(directory)
        model = assemble(backbone, dtype=serving_dtype("cpu"), packed=True)
        load_s = time.monotonic() - started
        prompts.mkdir()
        prompt = caption_prompt(config, backbone.fingerprint, arguments.prompt_length)
        (prompts / "caption.safetensors").write_bytes(write_prompt(prompt))
        seconds, stages = [], []
        options = EngineOptions(max_batch=arguments.batch)
        with engine_over(prompts, model, backbone.tokenizer(), backbone.fingerprint, options) as engine:
            ask(engine, 1)
            for _ in range(arguments.rounds):
                began = time.monotonic()
                answers = ask(engine, arguments.batch)
                seconds.append((time.monotonic() - began) / arguments.batch)
                stages.append(answers[-1].timings_ms)
    line = {
        "backbone": config.name,
        "dtype": str(model.dtype),
        "image_px": 480,
        "prompt_length": arguments.prompt_length,
        "batch": arguments.batch,
        "load_s": round(load_s, 1),
        "s_per_picture": round(statistics.median(seconds), 3),
        "batch_stages_ms": dict(stages[-1]),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        "threads": torch.get_num_threads(),
    }
    write_line(line)


if __name__ == "__main__":
    main()
