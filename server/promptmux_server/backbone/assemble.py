"""From loaded tensors to a frozen model on a device, ready to answer."""

from __future__ import annotations

import torch

from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.packed import pack
from promptmux_server.backbone.vision import channels_last
from promptmux_server.backbone.weights import LoadedBackbone, fold_batch_norm

FACTORED_ABOVE = 512 << 20
"""Bytes of dense biases that a grid may take on a GPU: OFA-large at 480 px takes 332 MB, at 672 px 1.2 GB."""


def assemble(
    loaded: LoadedBackbone, *, dtype: torch.dtype, device: torch.device | str = "cpu", packed: bool = False
) -> OFA:
    """Fold batch normalisation, fill the modules, freeze and move; the loader has checked names and shapes.

    `packed` lays weights out for a CPU's products: for serving, where nothing is differentiated.
    """
    with torch.device("meta"):
        model = OFA(loaded.config, folded=True)
    folded = fold_batch_norm(loaded.tensors)
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in folded.items()}, assign=True)
    model.eval().requires_grad_(False)
    channels_last(model.encoder.embed_images)
    if model.device.type == "cuda":
        model.encoder.factored_above = FACTORED_ABOVE
    if packed and model.device.type == "cpu":
        pack(model)
    return model


def serving_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, float32 elsewhere."""
    if torch.device(device).type == "cpu":
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32
