"""Every image's gradient in every weight, layer by layer; and the test that the exact traces rest on.

The exact traces hold where the logits are affine in each layer's output (and in the pixels), away from kinks, and
where each layer is affine in its own weights. Neither is read off the network: both are tried, on a few images, in
random directions. A quantity that ought to be zero and is not in one random direction shows that it is not zero; the
converse fails with probability zero. What the few images do not reach (a smooth part that is switched off for all of
them) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.grad import conv2d_weight

from lthlib.metrics.flatness.frozen import Frozen, check_finite, normal_like, twice_differentiable

TRIED = 8  # images
COUPLED = "images that change each other's logits (training-mode batch norm, an operation along the batch)"

Receive = Callable[[str, nn.Module, Tensor, Tensor], None]


def curved_parts(frozen: Frozen) -> list[str]:
    """Say what keeps the logits from being piecewise affine in pixels and layers' outputs together; empty: nothing.

    The second derivatives of a random sum of logits in all of these, times one random vector, are exactly zero in a
    piecewise-linear network: PyTorch's derivatives of ReLU, pooling, convolution and the like hold no rounding there.
    They are not where there is a smooth activation (GELU, softplus, softmax), a product or quotient of two things
    that depend on the image, or a normalisation by present statistics.

    Raises:
        UserError: For an operation that PyTorch cannot differentiate twice.
    """
    images = frozen.images[:TRIED]
    logits, pixels, shifts = forward(frozen, images)
    if not logits.requires_grad:
        return []
    names, points = zip(("the pixels", pixels), *shifts, strict=True)
    found = [COUPLED] if _coupled(logits, points) else []
    if _has_own_derivatives(logits):
        found.append("an operation with a derivative of its own, which need not be the true one")
    first = grad(logits, points, normal_like(logits, 0), create_graph=True, materialize_grads=True)
    tilt = sum((g * normal_like(g, 1, i)).sum() for i, g in enumerate(first))
    if tilt.requires_grad:
        with twice_differentiable():
            second = grad(tilt, points, materialize_grads=True)
        curved = [name for name, values in zip(names, second, strict=True) if bool(values.any())]
        if curved:
            found.append(f"no piecewise-linear network: logits bend behind {curved[-1]}")
    return found


def _coupled(logits: Tensor, points: tuple[Tensor, ...]) -> bool:
    """Tell whether the first image reaches another's logits, or another the first's."""
    n = len(logits)
    for chosen, others in ((slice(0, 1), slice(1, None)), (slice(1, None), slice(0, 1))):
        direction = torch.zeros_like(logits)
        direction[chosen] = normal_like(logits, 2)[chosen]
        reached = grad(logits, points, direction, retain_graph=True, materialize_grads=True)
        if any(bool(part[others].any()) for part in reached if len(part) == n):
            return True
    return False


def _has_own_derivatives(logits: Tensor) -> bool:
    """Tell whether a custom function or a simulated quantisation took part: their derivatives may be made up."""
    seen, stack = set(), [logits.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction) or "FakeQuantize" in node.name():
            return True
        stack.extend(parent for parent, _ in node.next_functions)
    return False


def unknown_gradients(frozen: Frozen) -> list[str]:
    """Say whose gradients image by image are not known; empty: those of all parameters are.

    Each layer's own, summed over images, are compared with what PyTorch finds for the parameter as a whole. They
    differ where a weight is used elsewhere too, in another way, or in a module without a rule.
    """
    images, found, sums = frozen.images[:TRIED], [], {}
    leaves = {name: weight.clone().requires_grad_() for name, weight in frozen.weights.items()}
    arrived: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    logits, pixels, _ = forward(frozen, images, lambda *call: arrived.append(call), leaves)
    direction = normal_like(logits, 3)
    if logits.requires_grad:
        grad(logits, pixels, direction, retain_graph=True, allow_unused=True)
    calls = list(arrived)  # without those that the next line adds
    wanted = grad(logits, list(leaves.values()), direction, materialize_grads=True) if logits.requires_grad else ()
    for name, module, x, g in calls:
        if len(g) != len(images):
            found.append(f"no rule for {name}, which sees shape {tuple(x.shape)} for {len(images)} images")
            continue
        for parameter, gradients in image_gradients(name, module, x, g):
            if parameter in sums:
                found.append(f"tied weights: {parameter} is used more than once")
            sums[parameter] = gradients.detach()
    tolerance = 10 * torch.finfo(logits.dtype).eps ** 0.5
    for (name, leaf), gradient in zip(leaves.items(), wanted, strict=False):
        known = sums.get(name, torch.zeros_like(leaf)[None])
        if (known.sum(0) - gradient).norm() > tolerance * torch.maximum(gradient.norm(), known.norm()):
            owner = type(frozen.model.get_submodule(name.rpartition(".")[0])).__name__
            found.append(f"no rule for the gradients of {name} (of {owner})")
    return list(dict.fromkeys(found))


def forward(
    frozen: Frozen, images: Tensor, receive: Receive | None = None, weights: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor, list[tuple[str, Tensor]]]:
    """Run the network, ready for derivatives.

    Args:
        frozen: The network.
        images: Shape (n, channels, height, width).
        receive: Called with name, module, input and the gradient of its output of every layer that has a rule,
            whenever such a gradient arrives.
        weights: In place of the network's own.

    Returns:
        The logits, the pixels, and for each layer with a rule its name and a shift of its output by 0.
    """
    shifts = []

    def shift(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not inputs:  # called by keyword
                return None
            zero = output.detach().new_zeros(()).expand_as(output).requires_grad_()
            shifts.append((name, zero))
            moved = output + zero
            if receive is not None:
                x = inputs[0].detach()
                moved.register_hook(lambda g: receive(name, module, x, g.detach()))
            return moved

        return hook

    modules = [(name, module) for name, module in frozen.model.named_modules() if _rule(module) is not None]
    handles = [module.register_forward_hook(shift(name), prepend=True) for name, module in modules]
    pixels = images.detach().requires_grad_()
    try:
        with torch.enable_grad():
            return check_finite(frozen(pixels, weights)), pixels, shifts
    finally:
        for handle in handles:
            handle.remove()


def image_gradients(name: str, module: nn.Module, x: Tensor, g: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and every image's gradient, shape (n, *weight), of the parameters of one layer.

    Args:
        name: Of the layer.
        module: The layer.
        x: What it was given.
        g: The gradient of its output.
    """
    for parameter, gradients in _rule(module)(module, x, g):
        if getattr(module, parameter) is not None:
            yield f"{name}.{parameter}" if name else parameter, gradients


def _rule(module: nn.Module) -> Callable | None:
    """Return the rule for the gradients of each image; None for subclasses that may compute otherwise."""
    for kind, rule in _RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in vars(module):
            return rule
    return None


def _conv_gradients(conv: nn.Conv2d, x: Tensor, g: Tensor) -> Iterator[tuple[str, Tensor]]:
    padding = conv.padding
    if conv.padding_mode != "zeros" or isinstance(padding, str):
        # The private attribute is what Conv2d itself pads with, for "same" and for modes other than zeros.
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode), 0
    n = len(x)
    shape = (n * conv.out_channels, *conv.weight.shape[1:])
    # Images as groups of one convolution: the library's fast kernel, and no copy of the patches.
    x, of_groups = (values.reshape(1, -1, *values.shape[2:]) for values in (x, g))
    gradients = conv2d_weight(x, shape, of_groups, conv.stride, padding, conv.dilation, n * conv.groups)
    yield "weight", gradients.unflatten(0, (n, conv.out_channels))
    yield "bias", g.sum((2, 3))


def _linear_gradients(linear: nn.Linear, x: Tensor, g: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "weight", torch.einsum("n...o,n...i->noi", g, x)
    yield "bias", g.flatten(1, -2).sum(1) if g.dim() > 2 else g


def _norm_gradients(norm: nn.BatchNorm2d, x: Tensor, g: Tensor) -> Iterator[tuple[str, Tensor]]:
    if norm.training or norm.running_mean is None:
        return
    x, g = (values.reshape(len(x), norm.num_features, -1) for values in (x, g))
    shift = g.sum(2)
    yield "weight", ((g * x).sum(2) - norm.running_mean * shift) * (norm.running_var + norm.eps).rsqrt()
    yield "bias", shift


_RULES = {
    nn.Conv2d: _conv_gradients,
    nn.Linear: _linear_gradients,
    nn.BatchNorm1d: _norm_gradients,
    nn.BatchNorm2d: _norm_gradients,
}
