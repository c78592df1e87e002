"""Networks for evaluation: copies that compute the same logits in less time."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from lthlib.networks.checks import agree, check_deterministic, copied


def inference_copy(model: nn.Module, images: Tensor, precision: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy that computes the same logits faster, in evaluation mode and without gradients.

    Batch normalisation is folded into the convolutions before it, and the memory layout is channels_last. The network
    itself stays as it is. Tracing may lose what a foreign network does (hooks, a replaced ``forward``, control flow):
    the copy must give its answers on two batches, or it is a plain copy. So must low precision, within a tenth.

    ``precision`` is ``torch.float32``, or ``torch.bfloat16``: convolutions and linear layers multiply in it, everything
    else stays in float32, as under autocast, but their weights are rounded once and not at every pass. The images are
    some of those it is for, at least one: [0, 1] floats (N, C, H, W), laid out in memory as all of them will be.
    `UserError` for a network whose answers depend on chance, neighbours or the past, or are no logits.
    """
    network = copied(model).cpu().eval().requires_grad_(False)
    found = check_deterministic(network, images.cpu())
    try:
        traced = fx.symbolic_trace(copied(network))
        traced = traced if _shares_layers(traced) else fuse(traced, inplace=True, no_trace=True)
        traced = traced.to(memory_format=torch.channels_last)
    except Exception:  # fx cannot follow every forward()
        traced = network
    network = traced if agree(traced, found, 1e-3) else network
    low = network if precision == torch.float32 else _LowPrecision(copied(network), precision)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return (low if agree(low, found, 0.1) else network).to(device)


def runs_in_parallel(network: nn.Module) -> bool:
    """Whether threads may share an `inference_copy`: one that was traced and has no hooks keeps nothing on itself."""
    traced = network.network if isinstance(network, _LowPrecision) else network
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in traced.modules())
    return isinstance(traced, fx.GraphModule) and not hooks


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
