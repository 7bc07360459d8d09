"""Backbone files in and out: three formats read, one written. No code in a file is ever run."""

from promptmux_server.backbone.weights.convert import ConversionReport, convert
from promptmux_server.backbone.weights.fold import fold_batch_norm
from promptmux_server.backbone.weights.load import load_backbone
from promptmux_server.backbone.weights.loaded import LoadedBackbone, fingerprint
from promptmux_server.backbone.weights.own_format import write_backbone

__all__ = [
    "ConversionReport",
    "LoadedBackbone",
    "convert",
    "fingerprint",
    "fold_batch_norm",
    "load_backbone",
    "write_backbone",
]
