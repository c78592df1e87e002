"""Is a network piecewise linear? The exact Hessian traces rest on it; the answer is in its graph.

A logit is affine in each single weight wherever every step of the computation is linear, piecewise linear, or
a product of factors that share no weight and no pixel. The graph that automatic differentiation records shows
every step that was taken, in modules, functions and methods alike; what is not known to be safe is named, not
assumed.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lthlib.metrics.flatness.frozen import draws_random_numbers, stateless, upstream

LINEAR = {
    "Add",
    "Sub",
    "Rsub",
    "Neg",
    "Sum",
    "Mean",
    "Cat",
    "Stack",
    "Clone",
    "ToCopy",
    "Alias",
    "Copy",
    "CopySlices",
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Reshape",
    "Permute",
    "Transpose",
    "T",
    "Squeeze",
    "Unsqueeze",
    "Expand",
    "Slice",
    "Select",
    "Narrow",
    "Split",
    "SplitWithSizes",
    "UnsafeSplit",
    "Unbind",
    "Index",
    "IndexSelect",
    "Gather",
    "Repeat",
    "Roll",
    "Flip",
    "AsStrided",
    "Diagonal",
    "MaskedFill",
    "Where",
    "AccumulateGrad",
    "ConstantPadNd",
    "ReflectionPad2D",
    "ReplicationPad2D",
    "PixelShuffle",
    "PixelUnshuffle",
    "ChannelShuffle",
    "AvgPool1D",
    "AvgPool2D",
    "AvgPool3D",
    "AdaptiveAvgPool1D",
    "AdaptiveAvgPool2D",
    "AdaptiveAvgPool3D",
    "MkldnnAdaptiveAvgPool2D",
    "UpsampleNearest2D",
    "UpsampleBilinear2D",
}
KINKED = {
    "Relu",
    "LeakyRelu",
    "RreluWithNoise",
    "Hardtanh",
    "Hardsigmoid",
    "Clamp",
    "ClampMin",
    "ClampMax",
    "Threshold",
    "Abs",
    "Maximum",
    "Minimum",
    "Max",
    "Min",
    "Amax",
    "Amin",
    "MaxPool2DWithIndices",
    "MaxPool3DWithIndices",
    "AdaptiveMaxPool2D",
    "AdaptiveMaxPool3D",
}
BATCH_NORM = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"}
PRODUCTS = {
    "Mul",
    "Convolution",
    "MkldnnConvolution",
    "Addmm",
    "Addmv",
    "Mm",
    "Mv",
    "Bmm",
    "Baddbmm",
    "Dot",
    "Linear",
    "PreluKernel",
    *BATCH_NORM,
}
STATISTICS = "normalisation by present statistics, as training-mode batch norm"
COUPLED = "images that change each other's logits (training-mode batch norm, an operation along the batch)"


def is_piecewise_linear(model: nn.Module, images: Tensor) -> bool:
    """Tell whether the logits are affine in each single weight and in the pixels; see `nonlinear_parts`."""
    return not nonlinear_parts(model, images)


def nonlinear_parts(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Name what keeps a network from being piecewise linear in each single weight, and in the pixels.

    Found are smooth activations and normalisations (GELU, tanh, softmax, layer norm, ...) as modules or as
    functions, products of two things that depend on the same weight or on the image, training-mode batch
    norm, active dropout, weights used twice, logits that another image of the batch changes (`COUPLED`), and
    any operation that is not known to be safe.

    Args:
        model: The network, in the mode in which it is to be measured.
        images: Shape (N, channels, height, width); the first two are used.

    Returns:
        One phrase each with the module that holds it, for instance ``"gelu in blocks.0 (MLP)"``; empty where
        the network is piecewise linear.
    """
    found = ["random numbers in the forward pass (dropout?)"] if draws_random_numbers(model, images) else []
    logits, pixels, owners, leaves = _record(model, images)
    nodes = upstream(logits.grad_fn, {})
    found += [*_faults(nodes, owners), *_tied(nodes, leaves), *([COUPLED] if _coupled(logits, pixels) else [])]
    return tuple(dict.fromkeys(found))


def _record(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, dict, dict]:
    """Run the model on copies; return logits and pixels, node of the graph -> module, and leaf -> name."""
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    x = images[:2].detach().clone().requires_grad_()
    owners: dict = {}
    devices = [images.device] if images.is_cuda else []
    with _owned(model, owners), torch.random.fork_rng(devices), torch.enable_grad():
        logits = stateless(model, {**weights, **buffers}, x)
    return logits, x, owners, {id(w): name for name, w in weights.items()}


def _coupled(logits: Tensor, pixels: Tensor) -> bool:
    """Tell whether the gradient of one image's logits reaches the other image; exact zeros where it does not."""
    for one in range(len(pixels) if logits.requires_grad and len(pixels) > 1 else 0):
        direction = torch.zeros_like(logits)
        direction[one] = torch.linspace(1, 2, logits.shape[1])  # a constant is 0 after a log-softmax
        (reached,) = torch.autograd.grad(logits, pixels, direction, retain_graph=True, materialize_grads=True)
        if bool(reached[1 - one].any()):
            return True
    return False


@contextlib.contextmanager
def _owned(model: nn.Module, owners: dict) -> Iterator[None]:
    """Note in ``owners`` which module's forward, the innermost, made each node of the graph."""
    inside: list[str] = ["the network"]

    def claim(tensors: object) -> None:
        for tensor in tensors if isinstance(tensors, tuple) else (tensors,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                owners.update(dict.fromkeys(upstream(tensor.grad_fn, owners), inside[-1]))

    def enter(label: str):
        def hook(module: nn.Module, args: tuple) -> None:
            claim(args)
            inside.append(label)

        return hook

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        claim(output)
        inside.pop()

    handles = []
    for name, module in model.named_modules():
        label = f"{name} ({type(module).__name__})" if name else f"the network ({type(module).__name__})"
        handles += [module.register_forward_pre_hook(enter(label)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _operation(node: object) -> str:
    return re.sub(r"Backward\d*$", "", node.name().rsplit("::", 1)[-1])


def _faults(nodes: list, owners: dict) -> list[str]:
    """Name the operations that are not affine in each single leaf; a leaf is a weight or the images."""
    depends: dict = {}
    faults = []
    for position, node in enumerate(nodes):
        factors = [depends.get(parent, 0) for parent, _ in node.next_functions]
        fault = _fault(node, factors)
        if fault:
            faults.append(f"{fault} in {owners.get(node, 'the network')}")
        own = 1 << position if not node.next_functions else 0
        depends[node] = own
        for leaves in factors:
            depends[node] |= leaves
    return faults


def _fault(node: object, factors: list[int]) -> str | None:
    operation = _operation(node)
    if operation in BATCH_NORM and node._saved_training:
        return STATISTICS
    if operation in LINEAR or operation in KINKED:
        return None
    if operation == "Div":
        return "a division by something that depends on weights or pixels" if any(factors[1:]) else None
    if operation in PRODUCTS:
        shared = any(a & b for a, b in itertools.combinations(factors, 2))
        return "a product of two terms that share weights or pixels" if shared else None
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).lower()


def _tied(nodes: list, leaves: dict) -> list[str]:
    uses: dict = {}
    for node in nodes:
        for parent, _ in node.next_functions:
            if parent is not None and hasattr(parent, "variable"):
                name = leaves.get(id(parent.variable))
                uses[name] = uses.get(name, 0) + 1
    return [f"tied weights: {name} is used {n} times" for name, n in uses.items() if name is not None and n > 1]
