"""VGG-16-BN: a chain of layers without shortcuts (Simonyan and Zisserman 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lthlib.networks.layers import Layers
from lthlib.networks.registry import architecture


class Vgg(nn.Module):
    """A chain of 3x3 convolutions with batch normalisation, max pools between them, one linear layer."""

    def __init__(self, layers: Layers, plan: Sequence[int | None]):
        super().__init__()
        self.normalize = layers.normalize()
        self.features = nn.Sequential()
        inputs, n = "input", 0
        for width in plan:
            if width is None:  # rounding up keeps 28-pixel images alive through five pools
                self.features.append(nn.MaxPool2d(2, 2, ceil_mode=True))
                continue
            n += 1
            outputs = layers.group(f"conv{n}", width)
            self.features.extend([layers.conv(inputs, outputs), layers.norm(outputs), nn.ReLU()])
            inputs = outputs
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = layers.linear(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, classes)."""
        x = self.avgpool(self.features(self.normalize(x)))
        return self.classifier(torch.flatten(x, 1))


@architecture("vgg16-bn", title="VGG-16-BN (one linear layer)", reference="simonyan2015very")
def _vgg16_bn(layers: Layers, image_size: int) -> nn.Module:
    widths = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    return Vgg(layers, [w for width, n in widths for w in (*[width] * n, None)])
