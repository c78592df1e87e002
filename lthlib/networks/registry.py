"""The networks by name: pixels in [0, 1] in, logits out, normalisation inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lthlib.core.errors import Registry, UserError, choose
from lthlib.networks.layers import Layers, Spec

FIXED = ("input", "classes")  # channel groups that data decide


@dataclass(frozen=True)
class Architecture:
    """One row of `ARCHITECTURES`: how it is called, how it is made, where it comes from (a BibTeX key)."""

    name: str
    title: str
    build: Callable[[Layers, int], nn.Module]
    reference: str


ARCHITECTURES: Registry[Architecture] = Registry("architecture")
"""Every architecture by its name; full once `lthlib.networks` is imported."""


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

    Convolutions are drawn from a normal law with variance 2/fan_out (He et al. 2015), batch normalisations start as the
    identity, linear layers as torch makes them. Below 64 pixels (``image_size``) the ResNets have the stem used for
    CIFAR. ``mean`` and ``std`` are those of each input channel over the training images, in [0, 1] pixels. ``channels``
    has counts by group name where they differ from the architecture's own, see `all_groups`.

    Returns:
        A network in training mode, float32; its first submodule is ``normalize``, its `Spec` is ``model.spec``.
    """
    entry = ARCHITECTURES[arch]
    spec = Spec(arch, in_channels, num_classes, image_size, tuple(mean), tuple(std), dict(channels or {}) or None, seed)
    layers = Layers(spec)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = entry.build(layers, image_size)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
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
    """Return how ``model`` was built; `UserError` where it was not made by `build`."""
    if not isinstance(getattr(model, "spec", None), Spec):
        raise UserError(
            f"{type(model).__name__} does not say how to rebuild it at other widths: make it by "
            "lthlib.networks.build, and add its architecture there if it is missing."
        )
    return model.spec
