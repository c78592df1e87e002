"""The networks: pixels in [0, 1] in, logits out, normalisation inside, layers that know their channel groups.

A *channel group* is a set of channels that layers share and that can only shrink together: the residual
stream of a stage is one group, the channels inside a block are another. Each convolution, batch normalisation
and linear layer carries ``in_group`` and ``out_group``. Hence any network here can be rebuilt at other widths
from a small mapping ``group -> channels``: the small dense networks and the structured ones of the book are
nothing else.

A new architecture is one function under ``@architecture``; it receives `Layers`, which makes the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lthlib.core.errors import Registry, UserError, choose

FIXED = ("input", "classes")


@dataclass(frozen=True)
class Architecture:
    """One row of `ARCHITECTURES`: how it is called, how it is made, where it comes from (a BibTeX key)."""

    name: str
    title: str
    build: Callable[[Layers, int], nn.Module]
    reference: str


@dataclass(frozen=True)
class Spec:
    """Everything needed to make the same network again (its weights aside); kept as ``model.spec``."""

    arch: str
    in_channels: int
    num_classes: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: Mapping[str, int] | None = None
    seed: int = 0


ARCHITECTURES: Registry[Architecture] = Registry("architecture")


def architecture(name: str, *, title: str, reference: str):
    """Register the function below as the architecture ``name``; it gets `Layers` and the image size."""

    def register(make: Callable[[Layers, int], nn.Module]):
        ARCHITECTURES[name] = Architecture(name, title, make, reference)
        return make

    return register


def build(
    arch: str,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    channels: Mapping[str, int] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make a network with fresh weights that depend on ``seed`` alone; global random state stays untouched.

    Convolutions are drawn from a normal law with variance 2/fan_out (He et al. 2015), batch normalisations
    start as the identity, linear layers as torch makes them.

    Args:
        arch: A name in `ARCHITECTURES`.
        in_channels: Channels of an image.
        num_classes: Number of logits.
        image_size: Height and width of an image in pixels; below 64 the ResNets have the stem used for CIFAR.
        mean: Mean of each input channel over the training images, in [0, 1] pixels.
        std: Standard deviation of each input channel, in the same unit.
        channels: Channel counts by group name where they differ from the architecture's own, see
        `all_groups`.
        seed: Of the initial weights.

    Returns:
        A network in training mode, float32; its first submodule is ``normalize``, its `Spec` is
        ``model.spec``.

    Raises:
        UserError: For an unknown architecture or group, or a width, mean or std that cannot be.
    """
    entry = ARCHITECTURES[arch]
    spec = Spec(arch, in_channels, num_classes, image_size, tuple(mean), tuple(std), dict(channels or {}) or None, seed)
    layers = Layers(spec)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = entry.build(layers, image_size)
        _initialise(model)
    for name in spec.channels or {}:
        choose(name, set(layers.sizes) - set(FIXED), f"channel group of {arch}")
    if next(iter(model._modules), None) != "normalize":
        raise ValueError(f"the first submodule of {arch} has to be `normalize`")
    model.spec, model.coupled_groups = spec, frozenset(layers.coupled)
    return model


def rebuild(model: nn.Module, channels: Mapping[str, int]) -> nn.Module:
    """Make a fresh network like ``model`` (same architecture, data and seed) with other channel counts."""
    return build(**vars(replace(spec_of(model), channels=channels)))


def spec_of(model: nn.Module) -> Spec:
    """Return how ``model`` was built.

    Raises:
        UserError: Where it was not made by `build`.
    """
    if not isinstance(getattr(model, "spec", None), Spec):
        raise UserError(
            f"{type(model).__name__} does not say how to rebuild it at other widths: make it by "
            "lthlib.networks.models.build, and add its architecture there if it is missing."
        )
    return model.spec


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Normalize(nn.Module):
    """(x - mean) / std by channel; the constants are no part of the state that is stored or pruned."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images (N, C, H, W)."""
        return (x - self.mean) / self.std


class Layers:
    """Makes the layers of one network, by channel groups.

    Attributes:
        sizes: Channels of every group named so far, "input" and "classes" among them.
        coupled: Groups that cannot lose single channels, because something else than a layer joins them.
    """

    def __init__(self, spec: Spec):
        for what, values in (("mean", spec.mean), ("std", spec.std)):
            if len(values) != spec.in_channels or not all(map(math.isfinite, values)):
                raise UserError(f"{what} needs one finite number per input channel ({spec.in_channels}), got {values}.")
        if min(spec.std) <= 0:
            raise UserError(f"std has to be positive in every channel, got {spec.std}.")
        self.spec = spec
        self.sizes: dict[str, int] = {}
        self.coupled: set[str] = set()
        self._size("input", spec.in_channels)
        self._size("classes", spec.num_classes)

    def group(self, name: str, channels: int, *, coupled: bool = False) -> str:
        """Open a channel group with its published width, which the network's description may override."""
        if coupled:
            self.coupled.add(name)
        return self._size(name, (self.spec.channels or {}).get(name, channels))

    def _size(self, name: str, channels: int) -> str:
        if channels != int(channels) or channels < 1:
            raise UserError(f"Group {name!r} needs a whole number of channels, at least 1; got {channels}.")
        self.sizes[name] = int(channels)
        return name

    def normalize(self) -> Normalize:
        """Make the first submodule of every network."""
        return Normalize(self.spec.mean, self.spec.std)

    def conv(self, inputs: str, outputs: str, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
        """Make a convolution without bias, padded to keep the size at stride 1."""
        sizes = self.sizes[inputs], self.sizes[outputs]
        return _join(nn.Conv2d(*sizes, kernel, stride, kernel // 2, bias=False), inputs, outputs)

    def norm(self, group: str) -> nn.BatchNorm2d:
        """Make a batch normalisation of one group."""
        return _join(nn.BatchNorm2d(self.sizes[group]), group, group)

    def linear(self, inputs: str, outputs: str = "classes") -> nn.Linear:
        """Make a linear layer on one feature per channel."""
        return _join(nn.Linear(self.sizes[inputs], self.sizes[outputs]), inputs, outputs)


def _join(layer: nn.Module, inputs: str, outputs: str) -> nn.Module:
    layer.in_group, layer.out_group = inputs, outputs
    return layer


# ---------------------------------------------------------------------------- residual networks


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016)."""

    expansion = 1

    def __init__(self, layers: Layers, name: str, inputs: str, stream: str, width: int, stride: int, shortcut: str):
        super().__init__()
        inner = layers.group(f"{name}.inner", width)
        self.conv1, self.bn1 = layers.conv(inputs, inner, 3, stride), layers.norm(inner)
        self.conv2, self.bn2 = layers.conv(inner, stream), layers.norm(stream)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(layers, inputs, stream, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map a stream (N, C, H, W) to the next one."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions around a shortcut, as in torchvision."""

    expansion = 4

    def __init__(self, layers: Layers, name: str, inputs: str, stream: str, width: int, stride: int, shortcut: str):
        super().__init__()
        first, second = layers.group(f"{name}.inner1", width), layers.group(f"{name}.inner2", width)
        self.conv1, self.bn1 = layers.conv(inputs, first, 1), layers.norm(first)
        self.conv2, self.bn2 = layers.conv(first, second, 3, stride), layers.norm(second)
        self.conv3, self.bn3 = layers.conv(second, stream, 1), layers.norm(stream)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(layers, inputs, stream, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map a stream (N, C, H, W) to the next one."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.downsample(x))


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


@architecture("resnet8", title="ResNet-8", reference="he2016deep")
def _resnet8(layers: Layers, image_size: int) -> nn.Module:
    return ResNet(layers, BasicBlock, (1, 1, 1), (16, 32, 64), stem=(3, 2))


@architecture("resnet20s", title="ResNet-20s (CIFAR, option-A shortcuts)", reference="he2016deep")
def _resnet20s(layers: Layers, image_size: int) -> nn.Module:
    return ResNet(layers, BasicBlock, (3, 3, 3), (16, 32, 64), shortcut="pad")


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


# ---------------------------------------------------------------------------- chains


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


# ---------------------------------------------------------------------------- looking at one


def all_groups(model: nn.Module) -> dict[str, int]:
    """Return the channels of every group that `build` lets one set, in the order of the layers."""
    groups: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and getattr(module, "out_group", "classes") not in FIXED:
            groups[module.out_group] = module.weight.shape[0]
    return groups


def channel_groups(model: nn.Module) -> dict[str, int]:
    """Return the groups from which structured pruning may remove single channels, and their sizes.

    The streams of a network with padding (option-A) shortcuts are left out: the padding joins the channels of
    one stage to fixed positions in the next, so only block-inner channels go. `all_groups` has them.
    """
    coupled = getattr(model, "coupled_groups", frozenset())
    return {name: size for name, size in all_groups(model).items() if name not in coupled}


def n_parameters(model: nn.Module) -> int:
    """Count all parameters: convolutions, normalisations and the linear layer."""
    return sum(p.numel() for p in model.parameters())


def convolution_cost(
    model: nn.Module, per_weight: Mapping[str, int] | None = None
) -> Callable[[Mapping[str, int]], int]:
    """Return a function that counts the convolution weights ``model`` would have at other widths.

    Nothing is built: a convolution has in * out * height * width weights. The function takes channels by
    group name; groups left out keep their size.

    Args:
        model: Made by `build`.
        per_weight: Count these layers instead: name -> what one weight of it costs, such as its output pixels
            for multiply-accumulates.
    """
    spec, layers = spec_of(model), dict(model.named_modules())
    if per_weight is None:
        per_weight = {name: 1 for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    now = all_groups(model) | {"input": spec.in_channels, "classes": spec.num_classes}
    terms = [
        (layers[name].in_group, layers[name].out_group, layers[name].weight[0, 0].numel() * each)
        for name, each in per_weight.items()
    ]

    def cost(channels: Mapping[str, int]) -> int:
        sizes = now | dict(channels)
        return sum(sizes[inputs] * sizes[outputs] * each for inputs, outputs, each in terms)

    return cost


def macs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Count the multiply-accumulates of each convolution and linear layer for one image.

    Padding counts as if multiplied, biases and normalisations are left out, as is usual. One forward pass in
    evaluation mode; the model is left as found.

    Args:
        model: Any network; shared layers count once per use.
        input_shape: (C, H, W) of an image.

    Returns:
        Layer name -> multiply-accumulates, in the order of the forward pass.
    """
    counts: dict[str, int] = {}

    def count(name: str):
        def hook(layer: nn.Module, _inputs, output: Tensor):
            counts[name] = counts.get(name, 0) + output.numel() * layer.weight[0].numel()

        return hook

    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    hooks = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    modes = [(m, m.training) for m in model.modules()]
    weight = next(model.parameters())
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, *input_shape, dtype=weight.dtype, device=weight.device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return counts
