"""From a pretraining checkpoint to the backbone directory that is shipped: bfloat16 weights, float32 statistics."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.backbone.weights import LoadedBackbone, write_backbone
from promptmux_server.backbone.weights.names import canonical_tensors
from promptmux_server.pocket.checkpoints import part_of
from promptmux_server.pocket.pretrain import CHECKPOINT, LOG
from promptmux_server.pocket.recipe import NUM_BINS, pocket_config

LESSON_LOG = "stem.jsonl"


def from_checkpoint(run: Path, tokenizer: Path) -> LoadedBackbone:
    """The backbone of a run's last checkpoint."""
    vocabulary = Tokenizer.load(tokenizer, num_codes=0, num_bins=NUM_BINS).text_vocab_size
    stored = load_file(run / CHECKPOINT)
    state = part_of(stored, "model")
    config = pocket_config(vocabulary)
    tensors, dropped = canonical_tensors(state, config)
    # Running statistics span orders of magnitude: rounding them to 8 bits of mantissa would shift every channel.
    rounded = {n: t if "running_" in n else t.to(torch.bfloat16) for n, t in tensors.items()}
    return LoadedBackbone(config, rounded, tokenizer, dropped)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the shipped backbone from a pretraining run.")
    parser.add_argument("--run", type=Path, default=Path("var/pocket/run"))
    parser.add_argument("--tokenizer", type=Path, default=Path("var/pocket/tokenizer"))
    parser.add_argument(
        "--lesson", type=Path, default=Path("var/pocket/stem.jsonl"), help="the log of the stem's lesson"
    )
    parser.add_argument("--out", type=Path, default=Path("server/promptmux_server/pocket/weights"))
    arguments = parser.parse_args()
    backbone = from_checkpoint(arguments.run, arguments.tokenizer)
    logs = {LOG: (arguments.run / LOG).read_bytes(), LESSON_LOG: arguments.lesson.read_bytes()}
    made = arguments.out.with_name(f"{arguments.out.name}.new")  # what is there stays until all is written
    shutil.rmtree(made, ignore_errors=True)
    write_backbone(made, backbone)
    for name, log in logs.items():
        (made / name).write_bytes(log)
    shutil.rmtree(arguments.out, ignore_errors=True)
    made.rename(arguments.out)
    print(f"{arguments.out}: fingerprint {backbone.fingerprint}")


if __name__ == "__main__":
    main()
