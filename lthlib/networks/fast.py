"""Networks for evaluation: copies that compute the same logits in less time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse


def inference_copy(model: nn.Module, precision: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy that computes the same logits faster, in evaluation mode and without gradients.

    Batch normalisation is folded into the convolutions before it, and the memory layout is channels_last. The network
    itself stays as it is. One that torch.fx cannot trace (a foreign one with control flow) only changes its layout.

    Args:
        model: Any network.
        precision: ``torch.float32``, or ``torch.bfloat16``: convolutions and linear layers multiply in it, everything
            else stays in float32, as under autocast, but their weights are rounded once and not at every pass.
    """
    network = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        traced = fx.symbolic_trace(network)
        network = traced if _shares_layers(traced) else fuse(traced, inplace=True, no_trace=True)
    except Exception:  # fx cannot follow every forward(); such a network gives the same numbers, only slower
        pass
    network = network.to(memory_format=torch.channels_last)
    return network if precision == torch.float32 else _LowPrecision(network, precision)


class _LowPrecision(nn.Module):
    """Autocast around a network whose weights are of the lower precision already; its output is float32."""

    def __init__(self, network: nn.Module, precision: torch.dtype):
        super().__init__()
        self.network, self.precision = network, precision
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(precision)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.precision):
            return self.network(x).float()


def _shares_layers(traced: fx.GraphModule) -> bool:
    """Whether a convolution or batch norm is applied twice, which folding would get wrong."""
    layers = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    foldable = [name for name in layers if isinstance(traced.get_submodule(name), nn.Conv2d | nn.BatchNorm2d)]
    return len(foldable) != len({id(traced.get_submodule(name)) for name in foldable})
