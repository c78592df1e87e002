"""Residual networks: ResNet-8, -20s, -18, -50 (He et al. 2016) and WRN-28-10 (Zagoruyko and Komodakis 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lthlib.core.errors import UserError
from lthlib.networks.layers import Layers
from lthlib.networks.registry import architecture


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016)."""

    expansion, kernels, inner = 1, (3, 3), ("inner",)

    def __init__(self, layers: Layers, name: str, inputs: str, stream: str, width: int, stride: int, shortcut: str):
        super().__init__()
        groups = [inputs, *(layers.group(f"{name}.{inner}", width) for inner in self.inner), stream]
        for i, kernel in enumerate(self.kernels):
            strides = stride if i == self.kernels.index(3) else 1  # the first 3x3 one has it
            self.add_module(f"conv{i + 1}", layers.conv(groups[i], groups[i + 1], kernel, strides))
            self.add_module(f"bn{i + 1}", layers.norm(groups[i + 1]))
        self.relu = nn.ReLU()
        self.downsample = _shortcut(layers, inputs, stream, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map a stream (N, C, H, W) to the next one."""
        y = self.bn1(self.conv1(x))
        for i in range(2, len(self.kernels) + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(self.relu(y)))
        return self.relu(y + self.downsample(x))


class Bottleneck(BasicBlock):
    """1x1, 3x3 (with the stride) and 1x1 convolutions around a shortcut, as in torchvision."""

    expansion, kernels, inner = 4, (1, 3, 1), ("inner1", "inner2")


class PadShortcut(nn.Module):
    """Option A of He et al. 2016: every other pixel, new channels zero, half of them on either side."""

    def __init__(self, before: int, after: int):
        super().__init__()
        if after < before:
            raise UserError(f"A padding shortcut cannot go from {before} to {after} channels: widths must not fall.")
        self.pad = ((after - before) // 2, (after - before + 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, before, H, W) to (N, after, H/2, W/2)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.pad))


def _shortcut(layers: Layers, inputs: str, stream: str, stride: int, kind: str) -> nn.Module:
    if inputs == stream and stride == 1:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(layers.sizes[inputs], layers.sizes[stream])
    return nn.Sequential(layers.conv(inputs, stream, 1, stride), layers.norm(stream))


class ResNet(nn.Module):
    """Stem, stages of residual blocks with one stream group each, global average pool, linear layer."""

    def __init__(
        self,
        layers: Layers,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        stem: tuple[int, int] = (3, 1),
        pool: bool = False,
        shortcut: str = "conv",
    ):
        super().__init__()
        self.normalize = layers.normalize()
        streams = [
            layers.group(f"stage{i}", width * block.expansion, coupled=shortcut == "pad")
            for i, width in enumerate(widths, start=1)
        ]
        # Where the first block needs no projection, stem and first stage are one stream.
        inputs = streams[0] if block.expansion == 1 else layers.group("stem", widths[0])
        self.conv1, self.bn1 = layers.conv("input", inputs, *stem), layers.norm(inputs)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        for i, (depth, width, stream) in enumerate(zip(depths, widths, streams, strict=True), start=1):
            blocks = nn.Sequential()
            for j in range(depth):
                stride = 2 if i > 1 and j == 0 else 1
                blocks.append(block(layers, f"layer{i}.{j}", inputs, stream, width, stride, shortcut))
                inputs = stream
            self.add_module(f"layer{i}", blocks)
        self.stages = len(streams)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = layers.linear(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.normalize(x)))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _register_for_cifar(suffix: str, words: str, widths: tuple[int, ...]) -> None:
    @architecture(f"resnet8{suffix}", title=f"ResNet-8{words}", reference="he2016deep")
    def _resnet8(layers: Layers, image_size: int) -> nn.Module:
        return ResNet(layers, BasicBlock, (1, 1, 1), widths, stem=(3, 2))

    title = f"ResNet-20s (CIFAR, option-A shortcuts){words}"

    @architecture(f"resnet20s{suffix}", title=title, reference="he2016deep")
    def _resnet20s(layers: Layers, image_size: int) -> nn.Module:
        return ResNet(layers, BasicBlock, (3, 3, 3), widths, shortcut="pad")


_register_for_cifar("", "", (16, 32, 64))
_register_for_cifar("-x0.5", ", 0.5 times as wide", (8, 16, 32))
_register_for_cifar("-x2", ", 2 times as wide", (32, 64, 128))


def _stem(image_size: int) -> dict:
    return {"stem": (7, 2), "pool": True} if image_size >= 64 else {}


@architecture("resnet18", title="ResNet-18", reference="he2016deep")
def _resnet18(layers: Layers, image_size: int) -> nn.Module:
    return ResNet(layers, BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), **_stem(image_size))


@architecture("resnet50", title="ResNet-50", reference="he2016deep")
def _resnet50(layers: Layers, image_size: int) -> nn.Module:
    return ResNet(layers, Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), **_stem(image_size))


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice around a shortcut (He et al. 2016b); a projection starts behind the first ReLU."""

    def __init__(self, layers: Layers, name: str, inputs: str, stream: str, width: int, stride: int):
        super().__init__()
        inner = layers.group(f"{name}.inner", width)
        self.bn1, self.conv1 = layers.norm(inputs), layers.conv(inputs, inner, 3, stride)
        self.bn2, self.conv2 = layers.norm(inner), layers.conv(inner, stream)
        self.relu = nn.ReLU()
        self.projects = inputs != stream
        self.shortcut = layers.conv(inputs, stream, 1, stride) if self.projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map a stream (N, C, H, W) to the next one."""
        active = self.relu(self.bn1(x))
        y = self.conv2(self.relu(self.bn2(self.conv1(active))))
        return y + self.shortcut(active if self.projects else x)


class WideResNet(nn.Module):
    """Pre-activation residual network, three stages (Zagoruyko and Komodakis 2016), without dropout."""

    def __init__(self, layers: Layers, depth: int, widen: int):
        super().__init__()
        self.normalize = layers.normalize()
        inputs = layers.group("stem", 16)
        self.conv1 = layers.conv("input", inputs)
        self.blocks = nn.Sequential()
        for i in range(3):
            width = 16 * 2**i * widen
            stream = layers.group(f"stage{i + 1}", width)
            for j in range((depth - 4) // 6):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"stage{i + 1}.{j}"
                self.blocks.append(PreActivationBlock(layers, name, inputs, stream, width, stride))
                inputs = stream
        self.bn, self.relu = layers.norm(inputs), nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = layers.linear(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, classes)."""
        x = self.blocks(self.conv1(self.normalize(x)))
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn(x))), 1))


@architecture("wrn-28-10", title="WRN-28-10", reference="zagoruyko2016wide")
def _wrn_28_10(layers: Layers, image_size: int) -> nn.Module:
    return WideResNet(layers, depth=28, widen=10)
