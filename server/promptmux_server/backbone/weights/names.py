"""Tensor names: which a backbone must have, which are known and not needed, how other programs call them.

Canonical names are fairseq's (ofa-spec 10.1). What only image generation uses is dropped, and so are buffers and the
tied copies of the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.model import OFA
from promptmux_server.errors import BackboneFileError, BackboneKeysError

EMBEDDING = "encoder.embed_tokens.weight"
TIED_COPIES = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")

_UNUSED = re.compile(
    r"(encoder|decoder)\.(version|token_rp_bucket|image_rp_bucket)"
    r"|decoder\.(image_position_idx|embed_image_positions\.weight)"
    r"|decoder\.(code_layernorm_embedding|image_pos_ln)\.(weight|bias)"
    r"|decoder\.image_rel_pos_table_list\.\d+\.weight"
    r"|.*\.num_batches_tracked"
)
_PROMPT = re.compile(r"(encoder|decoder)\.\1_prompt_encoder\.")

# Anchored between dots: "attn_ln" also ends "self_attn_ln" and "cross_attn_ln".
_FROM_TRANSFORMERS = (
    (re.compile(r"^(encoder\.layers\.\d+)\.self_attn_mid_layer_norm\."), r"\1.attn_ln."),
    (re.compile(r"^(decoder\.layers\.\d+)\.self_attn_mid_layer_norm\."), r"\1.self_attn_ln."),
    (re.compile(r"^(decoder\.layers\.\d+)\.cross_attn_mid_layer_norm\."), r"\1.cross_attn_ln."),
    (re.compile(r"^(decoder\.layers\.\d+)\.cross_attn_layer_norm\."), r"\1.encoder_attn_layer_norm."),
    (re.compile(r"^(decoder\.layers\.\d+)\.cross_attn\."), r"\1.encoder_attn."),
    (re.compile(r"^((?:encoder|decoder)\.layers\.\d+)\.ffn_layer_norm\."), r"\1.ffn_layernorm."),
)


def from_transformers(name: str) -> str:
    """The canonical name of a tensor of a transformers-format file (ofa-spec 10.3)."""
    for pattern, replacement in _FROM_TRANSFORMERS:
        name = pattern.sub(replacement, name)
    return name


def expected_shapes(config: BackboneConfig) -> dict[str, torch.Size]:
    """Every tensor that a backbone of this configuration consists of, batch normalisation unfolded."""
    with torch.device("meta"):
        state = OFA(config, folded=False).state_dict()
    return {name: tensor.shape for name, tensor in state.items() if not _UNUSED.fullmatch(name)}


def is_prompt(name: str) -> bool:
    """Whether a fairseq name belongs to a prompt generator rather than to the backbone."""
    return bool(_PROMPT.match(name))


def canonical_tensors(found: Mapping[str, Tensor], config: BackboneConfig) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of the backbone, and the names that were dropped as known and not needed.

    Raises BackboneKeysError listing everything missing, unexpected or of another shape; BackboneFileError if copies of
    the embedding differ.
    """
    for copy in TIED_COPIES:
        if copy in found and EMBEDDING in found and not torch.equal(found[copy], found[EMBEDDING]):
            raise BackboneFileError(f"{copy} differs from {EMBEDDING}; this model ties them")
    expected = expected_shapes(config)
    ignored = {n for n in found if _UNUSED.fullmatch(n) or n in TIED_COPIES or is_prompt(n)}
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys() - ignored)
    misshaped = [
        f"{name} is {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name].shape != shape
    ]
    if missing or unexpected or misshaped:
        raise BackboneKeysError(
            "The tensors do not fit the configuration.", missing=missing, unexpected=unexpected, misshaped=misshaped
        )
    return {name: found[name] for name in sorted(expected)}, tuple(sorted(ignored))
