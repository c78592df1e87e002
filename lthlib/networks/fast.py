"""Networks for evaluation: copies that compute the same logits in less time."""

from __future__ import annotations

import copy
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse


def inference_copy(model: nn.Module, precision: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy that computes the same logits faster, in evaluation mode and without gradients.

    Batch normalisation is folded into the convolutions before it, ReLUs work in place where nobody else reads what they
    overwrite, and the memory layout is channels_last. The network itself stays as it is. One that torch.fx cannot trace
    (a foreign one with control flow) only changes its layout.

    Args:
        model: Any network.
        precision: ``torch.float32``, or ``torch.bfloat16``: convolutions and linear layers multiply in it, everything
            else stays in float32, as under autocast, but their weights are rounded once and not at every pass.
    """
    network = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        traced = fx.symbolic_trace(network)
    except Exception:  # fx cannot follow every forward(); such a network gives the same numbers, only slower
        return _at_precision(network, precision)
    if not _shares_layers(traced):
        traced = fuse(traced, inplace=True, no_trace=True)
        if precision != torch.float32 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            _fuse_rectifiers(traced)  # in float32 the joint kernel is no faster
        _rectify_in_place(traced)
    return _at_precision(traced, precision)


def _at_precision(network: nn.Module, precision: torch.dtype) -> nn.Module:
    network = network.to(memory_format=torch.channels_last)
    if precision == torch.float32:
        return network
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(precision)
    return _LowPrecision(network, precision)


class _LowPrecision(nn.Module):
    """Autocast around a network whose weights are of the lower precision already; its output is float32."""

    def __init__(self, network: nn.Module, precision: torch.dtype):
        super().__init__()
        self.network, self.precision = network, precision

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.precision):
            return self.network(x).float()


def _shares_layers(traced: fx.GraphModule) -> bool:
    """Whether a convolution or batch norm is applied twice, which folding would get wrong."""
    layers = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    foldable = [name for name in layers if isinstance(traced.get_submodule(name), nn.Conv2d | nn.BatchNorm2d)]
    return len(foldable) != len({id(traced.get_submodule(name)) for name in foldable})


def _rectify_in_place(traced: fx.GraphModule) -> None:
    """Let a ReLU overwrite its input where that is fresh memory nobody else reads: a convolution or a sum."""
    for node in traced.graph.nodes:
        if not _is_rectifier(traced, node):
            continue
        source = node.args[0]
        made_by = traced.get_submodule(source.target) if source.op == "call_module" else source.target
        if len(source.users) == 1 and (isinstance(made_by, nn.Conv2d) or made_by in (operator.add, torch.add)):
            node.op, node.target, node.args, node.kwargs = "call_function", torch.relu_, (source,), {}
    traced.recompile()


class _RectifiedConv2d(nn.Module):
    """relu(conv(x)) or relu(conv(x) + residual) in one pass over memory on a processor; elsewhere step by step."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv = self.conv
        if x.device.type != "cpu":
            return F.relu(conv(x) if residual is None else conv(x) + residual)
        x = x.to(conv.weight.dtype)
        how = (conv.padding, conv.stride, conv.dilation, conv.groups)
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(x, conv.weight, conv.bias, *how, "relu", [], "")
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual.to(x.dtype), conv.weight, conv.bias, *how, "add", 1.0, "relu", [], None
        )


def _fuse_rectifiers(traced: fx.GraphModule) -> None:
    """Join each ReLU with the convolution before it, and with the sum between them, where nobody else reads these."""
    for node in list(traced.graph.nodes):
        if not _is_rectifier(traced, node):
            continue
        sources = node.args[:1]
        if _is_sum_of_maps(sources[0]):
            sources = sources[0].args
        source = next((s for s in sources if _is_plain_convolution(traced, s)), None)
        if source is None:
            continue
        traced.set_submodule(source.target, _RectifiedConv2d(traced.get_submodule(source.target)))
        with traced.graph.inserting_before(node):
            inputs = (*source.args, *(s for s in sources if s is not source))
            node.replace_all_uses_with(traced.graph.call_module(source.target, inputs))
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _is_plain_convolution(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a convolution that pads with zeros and that is read once."""
    conv = traced.get_submodule(node.target) if node.op == "call_module" else None
    return (
        isinstance(conv, nn.Conv2d)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and len(node.users) == 1
    )


def _is_sum_of_maps(node: fx.Node) -> bool:
    """Whether a sum is read once, and of two modules' or functions' results rather than of numbers or weights."""
    computed = ("call_module", "call_function", "call_method")
    return (
        node.target in (operator.add, torch.add)
        and len(node.users) == 1
        and not node.kwargs
        and all(isinstance(a, fx.Node) and a.op in computed for a in node.args)
        and node.args[0] is not node.args[1]
    )


def _is_rectifier(traced: fx.GraphModule, node: fx.Node) -> bool:
    module = traced.get_submodule(node.target) if node.op == "call_module" else None
    return isinstance(module, nn.ReLU) or node.target in (F.relu, torch.relu, torch.relu_)
