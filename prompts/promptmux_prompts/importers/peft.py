"""Prefixes as Hugging Face's PEFT saves them: a directory of adapter_config.json and adapter_model.safetensors.

Owns PEFT's two layouts and why its other kinds of adapters are refused. Reads no pickle and needs no peft.

PEFT's table is (P, 2 * L * d): 2L slots of K or V, each (P, H, D). Which slots layer i reads depends on the task:

    causal    K = slot 2i            V = slot 2i + 1               (num_transformer_submodules = 1)
    seq2seq   K = slot 4i mod 2L     V = slot (4i + 1) mod 2L      (num_transformer_submodules = 2)

For seq2seq models PEFT doubles the table and hands every second pair to a cross-attention cache that it then discards.
So half of what was saved is never read, pairs of layers share one prefix where L is even, and the encoder has none.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from safetensors.torch import load as parse_safetensors
from torch import Tensor

from promptmux_prompts.errors import ImportRefused, PromptShapeMismatch
from promptmux_prompts.format import PromptShape
from promptmux_prompts.importers.sides import ImportedSides, absent_side, check_table
from promptmux_prompts.strict_json import parse

Side = Literal["encoder", "decoder"]

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
_WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"

_INPUT_EMBEDDINGS = (
    "They stand in the input like words: every layer transforms them, and the decoder attends to what becomes of them. "
    "A deep prompt is keys and values in front of each layer's self-attention and has no place in the input, so it "
    "cannot say the same. Train the task with PREFIX_TUNING, or with prompt tuning on this backbone, and import that."
)
_REFUSED = MappingProxyType(
    {
        "PROMPT_TUNING": f"PROMPT_TUNING learns embeddings. {_INPUT_EMBEDDINGS}",
        "P_TUNING": f"P_TUNING learns embeddings, made by an MLP. {_INPUT_EMBEDDINGS}",
        "MULTITASK_PROMPT_TUNING": (
            "MULTITASK_PROMPT_TUNING learns embeddings, shared by tasks and scaled by a low-rank matrix for each. "
            f"{_INPUT_EMBEDDINGS}"
        ),
    }
)
_OTHER_KINDS = (
    "this kind of PEFT adapter learns no prefix; only PREFIX_TUNING can be imported. One that changes weights, such as "
    "LORA or IA3, needs a backbone of its own: merge it there (merge_and_unload), and convert the result with "
    "promptmux convert"
)


def import_peft(
    directory: Path, shape: PromptShape, *, backbone_name: str | None, side: Side = "decoder"
) -> ImportedSides:
    """The prefix of a PEFT directory, as a prompt of one side of the backbone.

    PEFT does not fingerprint its base model, so its name must end in `backbone_name`; None says that the caller vouches
    for it. `side` may be "encoder" for the causal layout only. Raises ImportRefused, PromptShapeMismatch, OSError, and
    InvalidPromptFile for a configuration that is not strict JSON.
    """
    config = _read_config(directory / CONFIG)
    seq2seq = _is_seq2seq(config)
    if seq2seq and side == "encoder":
        raise ImportRefused("PEFT never gives a seq2seq model's prefix to the encoder; import it for the decoder")
    if backbone_name is not None:
        _check_base(config, backbone_name)
    layers = shape.decoder_layers if side == "decoder" else shape.encoder_layers
    _check_sizes(config, layers, shape)
    table = _read_table(directory, shape)
    check_table(table, layers, shape)
    if config.get("num_virtual_tokens") != len(table):
        raise PromptShapeMismatch(f"the adapter has {len(table)} positions, its num_virtual_tokens says otherwise")
    slots = table.view(len(table), 2 * layers, shape.heads, shape.head_dim).permute(1, 2, 0, 3)  # (2L, H, P, D)
    keys = [(4 if seq2seq else 2) * layer % (2 * layers) for layer in range(layers)]
    own = (slots[keys], slots[[slot + 1 for slot in keys]])
    origin = {
        "format": "peft",
        "layout": "seq2seq" if seq2seq else "causal",
        "peft_version": (_text(config, "peft_version") or "")[:64] or None,
        "base_model": _base_name(config),
        "prefix_projection": config.get("prefix_projection") is True,
    }
    if side == "encoder":
        return ImportedSides(own, absent_side(shape.decoder_layers, shape), origin)
    return ImportedSides(absent_side(shape.encoder_layers, shape), own, origin)


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration of a prefix; everything else is refused."""
    if not path.exists():
        raise ImportRefused(f"the directory holds no {CONFIG}; give the one that PEFT's save_pretrained wrote")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ImportRefused(f"{CONFIG} has more than {MAX_CONFIG_BYTES} bytes, which no adapter's configuration needs")
    config = parse(path.read_bytes(), CONFIG)
    if not isinstance(config, dict):
        raise ImportRefused(f"{CONFIG} must be an object")
    if config.get("peft_type") != "PREFIX_TUNING":
        raise ImportRefused(_REFUSED.get(_text(config, "peft_type") or "", _OTHER_KINDS))
    if config.get("modules_to_save"):
        raise ImportRefused(
            "the adapter also replaces modules of its base model (modules_to_save), and a backbone here stays frozen: "
            "train the prefix alone"
        )
    return config


def _is_seq2seq(config: dict[str, Any]) -> bool:
    """Absent, the number of submodules follows from the task, as in PEFT."""
    submodules = config.get("num_transformer_submodules")
    if submodules is None:
        submodules = 2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1
    if submodules not in (1, 2):
        raise ImportRefused("num_transformer_submodules must be 1 (causal layout) or 2 (seq2seq layout)")
    return bool(submodules == 2)


def _check_base(config: dict[str, Any], backbone_name: str) -> None:
    base = _base_name(config)
    if base is None or base.lower() != backbone_name.lower():
        found = "does not name its base model" if base is None else "was trained on a base model of another name"
        raise ImportRefused(
            f"the adapter {found}, and a prefix means nothing to another model than its own, even of the same size. "
            f"If that model is the backbone {backbone_name[:64]!r}, say so (--same-backbone)"
        )


def _check_sizes(config: dict[str, Any], layers: int, shape: PromptShape) -> None:
    expected = {
        "num_layers": layers,
        "num_attention_heads": shape.heads,
        "token_dim": shape.heads * shape.head_dim,
    }
    for name, number in expected.items():
        if config.get(name) != number:
            raise PromptShapeMismatch(f"{name} of the adapter is not {number}, as this backbone has it")


def _read_table(directory: Path, shape: PromptShape) -> Tensor:
    weights = directory / _WEIGHTS
    if not weights.exists():
        if (directory / _PICKLE).exists():
            raise ImportRefused(
                f"{_PICKLE} is a pickle, which could run code, and is not read. Save the adapter as safetensors: "
                "PeftModel.from_pretrained(base, directory).save_pretrained(directory)"
            )
        raise ImportRefused(f"the directory holds no {_WEIGHTS}")
    if weights.stat().st_size > shape.max_bytes:
        raise PromptShapeMismatch(f"a prefix for this backbone has at most {shape.max_bytes} bytes")
    try:
        tensors = parse_safetensors(weights.read_bytes())  # never mapped: see format.py
    except OSError:
        raise
    except Exception as error:  # the library raises KeyError, ValueError and TypeError too
        raise ImportRefused(f"{_WEIGHTS} cannot be read") from error
    if set(tensors) != {"prompt_embeddings"}:
        raise ImportRefused(f"{_WEIGHTS} must hold prompt_embeddings and nothing else")
    return tensors["prompt_embeddings"]


def _base_name(config: dict[str, Any]) -> str | None:
    """What a hub id or a directory ends in."""
    base = (_text(config, "base_model_name_or_path") or "").replace("\\", "/").rstrip("/")
    return base.rpartition("/")[2][:64] or None


def _text(config: dict[str, Any], name: str) -> str | None:
    value = config.get(name)
    return value if isinstance(value, str) else None
