"""Whether the exact traces hold for a network: tried on a few images, in random directions.

They hold where the logits are affine, away from kinks, in the pixels and in each parameter by itself. A second
derivative that ought to be zero and is not in one random direction shows that it is not zero; the converse fails with
probability zero. What the few images do not reach (a smooth part that is switched off for all of them) is not seen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import grad

from lthlib.metrics.flatness.frozen import Frozen, check_finite, normal_like, twice_differentiable

TRIED, TRIED_WEIGHTS = 8, 2  # images; each parameter costs a backward pass of its own


def curved_parts(frozen: Frozen, weights: bool) -> list[str]:
    """Say what keeps the logits from being piecewise affine in the pixels (and in each parameter); empty: nothing.

    Where they are, second derivatives are exactly zero: PyTorch's derivatives of ReLU, pooling, convolution and the
    like hold no rounding there. They are not behind a smooth activation, a product or quotient of things that depend on
    the image, or a weight that is used twice.
    """
    pixels = frozen.images[: TRIED_WEIGHTS if weights else TRIED].detach().requires_grad_()
    leaves = {name: weight.clone().requires_grad_() for name, weight in frozen.weights.items()} if weights else {}
    with torch.enable_grad():
        logits = check_finite(frozen(pixels, leaves))
    if not logits.requires_grad:
        return []
    found = []
    if _has_own_derivatives(logits):
        found.append("an operation with a derivative of its own, which need not be the true one")
    points = {"the pixels": pixels, **leaves}
    first = grad(logits, list(points.values()), normal_like(logits, 0), create_graph=True, materialize_grads=True)
    curved = []
    for i, ((name, point), gradient) in enumerate(zip(points.items(), first, strict=True)):
        tilt = (gradient * normal_like(gradient, 1, i)).sum()
        if tilt.requires_grad:
            with twice_differentiable():
                (second,) = grad(tilt, point, retain_graph=True, materialize_grads=True)
            curved += [name] if bool(second.any()) else []
    if curved:
        found.append(f"no piecewise-linear network: logits bend behind {curved[-1].rpartition('.')[0] or curved[-1]}")
    return found


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
