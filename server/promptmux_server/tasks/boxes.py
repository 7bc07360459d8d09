"""Boxes as location bins and back (ofa-spec 8).

A box lives in pixels of the user's picture, w by h; the model sees it resized to S by S; bins divide `max_image_size`,
which is 512 for the released models whatever S is.
"""

from __future__ import annotations

from promptmux_server.backbone.config import BackboneConfig

Box = tuple[float, float, float, float]
Bins = tuple[int, int, int, int]


def box_to_bins(box: Box, width: int, height: int, image_size: int, config: BackboneConfig) -> Bins:
    """Bins of (x0, y0, x1, y1); halves round to even, nothing is clipped."""
    scale = (image_size / width, image_size / height) * 2
    last = config.num_bins - 1
    x0, y0, x1, y1 = (
        round(value * factor / config.max_image_size * last) for value, factor in zip(box, scale, strict=True)
    )
    return x0, y0, x1, y1


def bins_to_box(bins: Bins, width: int, height: int, image_size: int, config: BackboneConfig) -> Box:
    """The inverse, up to the width of a bin."""
    scale = (image_size / width, image_size / height) * 2
    last = config.num_bins - 1
    x0, y0, x1, y1 = (value / last * config.max_image_size / factor for value, factor in zip(bins, scale, strict=True))
    return x0, y0, x1, y1
