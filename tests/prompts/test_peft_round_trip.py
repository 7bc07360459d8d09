"""What PEFT's own models do with a prefix is what ours do with the prompt imported from it, layer by layer.

PEFT saves, PEFT loads and runs its model; what its layers read and compute is compared with the imported prompt.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from promptmux_kernels import Rows, SharedBias, pack_prompts, reference
from promptmux_prompts import Manifest, Prompt, PromptShape, read_prompt, write_prompt
from promptmux_prompts.errors import ImportRefused
from promptmux_prompts.importers import import_peft

os.environ.setdefault("HF_HUB_OFFLINE", "1")
peft = pytest.importorskip("peft", reason="the round trips need peft and transformers: pip install -e '.[dev]'")
transformers = pytest.importorskip("transformers", reason="peft runs on transformers: pip install -e '.[dev]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning"),
]

HEADS, HEAD_DIM, LENGTH = 2, 8, 5
IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])


@dataclass
class Watched:
    """What one self-attention read and wrote, (tokens, ...), and the prefix that it was handed, (H, P, D) each."""

    seen: dict[str, Tensor] = field(default_factory=dict)
    prefix: tuple[Tensor, Tensor] | None = None

    def keep(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
            self.seen[name] = output[0]

        return hook

    def keep_context(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen["context"] = inputs[0][0]

    def keep_prefix(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            (cache,) = (c for c in (*inputs, *named.values()) if isinstance(c, transformers.Cache))
            own = getattr(cache, "self_attention_cache", cache).layers[layer]
            self.prefix = own.keys[0].clone(), own.values[0].clone()

        return hook


def gpt2(layers: int) -> tuple[nn.Module, str]:
    config = transformers.GPT2Config(
        n_layer=layers, n_head=HEADS, n_embd=HEADS * HEAD_DIM, n_positions=64, vocab_size=50, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), "CAUSAL_LM"


def bart(layers: int) -> tuple[nn.Module, str]:
    config = transformers.BartConfig(
        encoder_layers=layers, decoder_layers=layers, d_model=HEADS * HEAD_DIM, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=50,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config), "SEQ_2_SEQ_LM"


def saved(make: Callable[[int], tuple[nn.Module, str]], layers: int, *, projected: bool, to: Path) -> nn.Module:
    """A model with a fresh prefix, saved by PEFT; the model without it."""
    torch.manual_seed(layers)
    base, task = make(layers)
    settings = {"prefix_projection": True, "encoder_hidden_size": 12} if projected else {}
    tuned = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=LENGTH, **settings))
    tuned.save_pretrained(str(to))
    return base


def run_and_watch(base: nn.Module, directory: Path) -> list[Watched]:
    """PEFT loads what it saved and runs the model; one entry a layer that reads the prefix."""
    tuned = peft.PeftModel.from_pretrained(base, str(directory)).eval()
    blocks = base.transformer.h if hasattr(base, "transformer") else base.model.decoder.layers
    watched = []
    for layer, block in enumerate(blocks):
        attention, own = getattr(block, "attn", None) or block.self_attn, Watched()
        attention.register_forward_pre_hook(own.keep_prefix(layer), with_kwargs=True)
        if hasattr(attention, "c_attn"):
            attention.c_attn.register_forward_hook(own.keep("qkv"))
            attention.c_proj.register_forward_pre_hook(own.keep_context)
        else:
            for name in ("q", "k", "v"):
                getattr(attention, f"{name}_proj").register_forward_hook(own.keep(name))
            attention.out_proj.register_forward_pre_hook(own.keep_context)
        watched.append(own)
    with torch.no_grad():
        tuned(input_ids=IDS, **({} if hasattr(base, "transformer") else {"decoder_input_ids": IDS}))
    return watched


def imported(directory: Path, layers: int) -> Prompt:
    """Through the importer, the prompt file and its checks, as a server would read it."""
    shape = PromptShape(layers, layers, HEADS, HEAD_DIM)
    manifest = Manifest.minimal(name="imported", backbone_name="b", fingerprint="f", encoder_length=0, decoder_length=0)
    prompt = import_peft(directory, shape, backbone_name=None).prompt(manifest)
    return read_prompt(write_prompt(prompt), shape=shape, fingerprint="f", dtype=torch.float32)


def our_attention(prompt: Prompt, layer: int, watched: Watched) -> Tensor:
    """Our op on the queries, keys and values of their layer: (tokens, H * D)."""
    seen = watched.seen
    q, k, v = seen["qkv"].chunk(3, dim=-1) if "qkv" in seen else (seen["q"], seen["k"], seen["v"])
    q, k, v = (x.unflatten(-1, (HEADS, HEAD_DIM)) for x in (q, k, v))
    tokens = len(q)
    pool = pack_prompts([(prompt.decoder_key, prompt.decoder_value)], [0])
    out, _ = reference.prefix_attention(
        q, k, v, rows=Rows.packed([tokens]), prompts=pool.layer(layer),
        bias=SharedBias((torch.zeros(HEADS, tokens, tokens),), (0,)), scale=HEAD_DIM**-0.5,
        head_scale=torch.ones(HEADS), causal=True,
    )  # fmt: skip
    return out.flatten(1)


CASES = [(gpt2, 3, False), (gpt2, 2, True), (bart, 2, False), (bart, 3, False), (bart, 4, True)]


@pytest.mark.parametrize(("make", "layers", "projected"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_pefts_layers_read_and_compute_what_ours_do(
    make: Callable[[int], tuple[nn.Module, str]], layers: int, projected: bool, tmp_path: Path
) -> None:
    base = saved(make, layers, projected=projected, to=tmp_path)
    prompt = imported(tmp_path, layers)
    watched = run_and_watch(base, tmp_path)
    assert len(watched) == layers
    for layer, theirs in enumerate(watched):
        assert theirs.prefix is not None
        assert torch.equal(theirs.prefix[0], prompt.decoder_key[layer])
        assert torch.equal(theirs.prefix[1], prompt.decoder_value[layer])
        torch.testing.assert_close(our_attention(prompt, layer, theirs), theirs.seen["context"], atol=2e-6, rtol=0)


def test_a_seq2seq_prefix_read_in_the_causal_layout_would_be_wrong(tmp_path: Path) -> None:
    """The control: the layouts agree in the first layer only, so the test above tells them apart."""
    base = saved(bart, 3, projected=False, to=tmp_path)
    config = tmp_path / "adapter_config.json"
    theirs = run_and_watch(base, tmp_path)
    text = config.read_text()
    assert '"num_transformer_submodules": 2' in text
    config.write_text(text.replace('"num_transformer_submodules": 2', '"num_transformer_submodules": 1'))
    naive = imported(tmp_path, 3)
    agree = [torch.equal(own.prefix[0], naive.decoder_key[layer]) for layer, own in enumerate(theirs) if own.prefix]
    assert agree == [True, False, False]
    error = (our_attention(naive, 1, theirs[1]) - theirs[1].seen["context"]).abs().max()
    assert error > 1e-2


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH),
        lambda: peft.PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH, encoder_hidden_size=8),
        lambda: peft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH, num_tasks=2),
        lambda: peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj"]),
    ],
    ids=["prompt tuning", "p-tuning", "multitask", "lora"],
)
def test_what_peft_saves_of_another_kind_is_refused_and_explained(config: Callable[[], Any], tmp_path: Path) -> None:
    base, _ = bart(2)
    peft.get_peft_model(base, config()).save_pretrained(str(tmp_path))
    with pytest.raises(ImportRefused, match=r"PREFIX_TUNING"):
        imported(tmp_path, 2)
