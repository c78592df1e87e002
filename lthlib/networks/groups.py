"""Channel groups of a network, and what it costs: convolution weights and multiply-accumulates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lthlib.networks.registry import FIXED, spec_of


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


def convolution_cost(
    model: nn.Module, per_weight: Mapping[str, int] | None = None
) -> Callable[[Mapping[str, int]], int]:
    """Return a function that counts the convolution weights ``model`` would have at other widths.

    Nothing is built: a convolution has in * out * height * width weights. The function takes channels by
    group name; groups left out keep their size. With ``per_weight`` these layers are counted instead: name -> what one
    weight of it costs, such as its output pixels for multiply-accumulates.
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
    """Count the multiply-accumulates of each convolution and linear layer for one image (C, H, W), in order of use.

    Padding counts as if multiplied, biases and normalisations are left out, as is usual. Counted in one forward pass of
    a copy in evaluation mode; layers that are used twice count twice.
    """
    counts: dict[str, int] = {}

    def count(name: str, layer: nn.Module, _inputs, output: Tensor) -> None:
        counts[name] = counts.get(name, 0) + output.numel() * layer.weight[0].numel()

    model = copy.deepcopy(model).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(partial(count, name))
    weight = next(model.parameters())
    with torch.no_grad():
        model(torch.zeros(1, *input_shape, dtype=weight.dtype, device=weight.device))
    return counts
