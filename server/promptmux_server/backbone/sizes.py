"""The released sizes of OFA (ofa-spec 1)."""

from __future__ import annotations

from promptmux_server.backbone.config import RESNET_BLOCKS, BackboneConfig


def _size(name: str, d_model: int, heads: int, encoder: int, decoder: int, resnet: str) -> BackboneConfig:
    return BackboneConfig(
        name=name,
        vocab_size=59_457,
        d_model=d_model,
        ffn_dim=4 * d_model,
        heads=heads,
        encoder_layers=encoder,
        decoder_layers=decoder,
        resnet_blocks=RESNET_BLOCKS[resnet],
    )


OFA_SIZES: dict[str, BackboneConfig] = {
    "tiny": _size("ofa-tiny", 256, 4, 4, 4, "resnet50"),
    "medium": _size("ofa-medium", 512, 8, 4, 4, "resnet101"),
    "base": _size("ofa-base", 768, 12, 6, 6, "resnet101"),
    "large": _size("ofa-large", 1024, 16, 12, 12, "resnet152"),
    "huge": _size("ofa-huge", 1280, 16, 24, 12, "resnet152"),
}
