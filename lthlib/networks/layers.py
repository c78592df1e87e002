"""Layers that know their channel groups, and the normalisation that stands before them.

A *channel group* is a set of channels that layers share and that can only shrink together: the residual stream of a
stage is one group, the channels inside a block are another. Each convolution, batch normalisation and linear layer
carries ``in_group`` and ``out_group``. Hence any network here can be rebuilt at other widths from a small mapping
``group -> channels``: the small dense networks and the structured ones are nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lthlib.core.errors import UserError


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


class Normalize(nn.Module):
    """(x - mean) / std by channel; the constants are no part of the state that is stored or pruned.

    They stay in float64 and are rounded to the images' type at use, so that ``model.double()`` has the exact ones.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            exact = torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
            self.register_buffer(name, exact, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        exact = self.mean, self.std
        super()._apply(fn, recurse)  # may move them to another device, and would round them
        self.mean, self.std = (tensor.to(self.mean.device) for tensor in exact)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images (N, C, H, W)."""
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)


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
