"""The vision stem: three stages of a ResNet v1.5, from normalised pixels to patch features (ofa-spec 2.1).

Owns the convolutions only; projection into the transformer belongs to the encoder. Nothing here depends on a prompt,
which is why one picture passes once, whatever the number of tasks that look at it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from promptmux_server.backbone.config import BackboneConfig

EXPANSION = 4


def _norm(channels: int, folded: bool) -> nn.Module:
    return nn.Identity() if folded else nn.BatchNorm2d(channels)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1, and a projected shortcut where the shape changes."""

    def __init__(self, channels: int, planes: int, stride: int, *, folded: bool) -> None:
        super().__init__()
        wide = planes * EXPANSION
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=folded)
        self.bn1 = _norm(planes, folded)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=folded)
        self.bn2 = _norm(planes, folded)
        self.conv3 = nn.Conv2d(planes, wide, 1, bias=folded)
        self.bn3 = _norm(wide, folded)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != wide:
            self.downsample = nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=folded), _norm(wide, folded))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        out: Tensor = self.relu(x.add_(shortcut) if not self.training else x + shortcut)
        return out


class VisionStem(nn.Module):
    """(B, 3, S, S') normalised pixels -> (B, 16 * resnet_width, S/16, S'/16) features.

    `folded` has batch normalisation folded into the convolutions (inference, prompt tuning); pretraining of a backbone
    needs it unfolded.
    """

    def __init__(self, config: BackboneConfig, *, folded: bool = True) -> None:
        super().__init__()
        width = config.resnet_width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=folded)
        self.bn1 = _norm(width, folded)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        stages = []
        for stage, blocks in enumerate(config.resnet_blocks):
            planes = width << stage
            layers = []
            for block in range(blocks):
                stride = 2 if stage and block == 0 else 1
                layers.append(Bottleneck(channels, planes, stride, folded=folded))
                channels = planes * EXPANSION
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = stages

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(pixels))))
        out: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return out


def channels_last(stem: nn.Module) -> None:
    """Lay convolution weights out channels-last, in place: faster on CPUs, and what tensor cores read."""
    for parameter in stem.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
