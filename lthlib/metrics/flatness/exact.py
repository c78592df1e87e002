r"""Hessian traces of the cross-entropy, in the weights and in the pixels: exact where they can be, else estimated.

In a piecewise-linear network every logit is affine in each single weight w_j (and in each pixel), away from kinks. The
chain rule then leaves, on the diagonal, the Gauss-Newton part alone:

    d²L/dw_j² = 1/N Σ_i (dz_i/dw_j)ᵀ (diag(p_i) - p_i p_iᵀ) (dz_i/dw_j) = 1/N Σ_i Σ_k (v_ikᵀ dz_i/dw_j)²,

where v_i1 .. v_i,C-1 factor the softmax's Hessian (`sample_factor`): C - 1 vector-Jacobian products of every image,
and no randomness. Logits are affine in all pixels at once, so there the Hessian *is* its Gauss-Newton part, with the
eigenvalues of a (C - 1) x (C - 1) Gram matrix. Whether a network is piecewise linear is tried, see `curved_parts`.

Networks, images (N, channels, height, width) in [0, 1], labels (N,) and masks are as `Frozen` takes them; the network
is measured in evaluation mode and left as it was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import vjp, vmap

from lthlib.core.errors import UserError, choose
from lthlib.metrics.flatness.frozen import Frozen, check_finite, normal_like, rademacher_like, twice_differentiable
from lthlib.metrics.flatness.spectrum import WeightHessian, lanczos, tridiagonal

JACOBIAN_BYTES = 2**28  # of as many images as are taken at a time
TRIED, TRIED_WEIGHTS = 8, 2  # images; each parameter costs a backward pass of its own


@dataclass(frozen=True)
class WeightTrace:
    """The trace of the weight Hessian of the mean cross-entropy, and the parts it is made of.

    Attributes:
        total: tr(M H M) in nats; M keeps the active weights.
        relative: Σ_j w_j² H_jj over the active weights, in nats: unchanged when a layer is rescaled and the next
            normalisation undoes it, as the total is not. What is called ``relative_*`` below belongs to it.
        active: Parameter name -> number of its weights that no mask removes.
        per_parameter: Parameter name -> its share of the total.
        method: ``"exact"`` or ``"hutchinson"``, which is an estimate, for the ``reason`` given.
        standard_error: Of ``total`` from the random probes; 0 for the exact method. What another batch of images would
            change is another matter, see `lthlib.figures.flatness.image_interval`.
        per_image: Contribution of each image, shape (N,), with mean ``total``; None from an estimator.
    """

    total: float
    relative: float
    active: dict[str, int] = field(repr=False)
    per_parameter: dict[str, float] = field(repr=False)
    relative_per_parameter: dict[str, float] = field(repr=False)
    method: str = "exact"
    standard_error: float = 0.0
    relative_standard_error: float = 0.0
    reason: str = ""
    per_image: Tensor | None = field(default=None, repr=False)
    relative_per_image: Tensor | None = field(default=None, repr=False)

    @property
    def per_weight(self) -> float:
        """The total divided by the number of active weights: comparable across sparsities."""
        return self.total / sum(self.active.values())


@dataclass(frozen=True)
class InputHessian:
    """The Hessian of each image's own cross-entropy in its pixels, units nats per pixel², pixels in [0, 1].

    ``trace`` and ``top``, the largest eigenvalue, are given per image, (N,). The method is ``"exact"``, or
    ``"hutchinson+lanczos"`` for the ``reason`` given; then random probes leave a ``trace_standard_error``, and an
    eigenvalue lies within ``top_residual`` of ``top``; both are zeros for the exact method.
    """

    trace: Tensor
    top: Tensor
    method: str
    trace_standard_error: Tensor
    top_residual: Tensor
    reason: str = ""

    def __float__(self) -> float:
        return float(self.trace.double().mean())

    @property
    def legacy_batch_eigenvalue(self) -> float:
        """What the paper's code reports: the top eigenvalue of the batch's *mean* loss, max_i top_i / N.

        The joint Hessian of the mean loss is block diagonal with blocks H_i / N, so this number halves when the batch
        is doubled with images no sharper.
        """
        return float(self.top.max()) / len(self.top)


def hessian_trace(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Mapping[str, Tensor] | None = None,
    *,
    method: str = "auto",
    max_classes: int = 200,
    probes: int = 30,
    seed: int = 0,
) -> WeightTrace:
    """Return the trace of the weight Hessian (lower is flatter), exact where possible, else estimated.

    It is the Hessian of the mean cross-entropy over the batch in all parameters, restricted to the active ones, at the
    masked weights. The exact method takes C - 1 vector-Jacobian products; memory is bounded, whatever the number of
    images. In a piecewise-linear network the trace does not depend on the labels. In float32 two processors round
    differently: expect exact traces to agree to 1e-5 of themselves.

    The method is ``"exact"``, ``"hutchinson"`` (an estimate from random ``probes``, Hessian-vector products with a
    ``seed``), or ``"auto"``: exact for a piecewise-linear network of at most ``max_classes`` classes, each of which
    costs a vector-Jacobian product, else ``"hutchinson"``.

    Raises:
        UserError: For an unknown method, for ``"exact"`` where it does not hold, a loss that is not finite, an
            operation without second derivative, and what `Frozen` refuses.
    """
    choose(method, ["auto", "exact", "hutchinson"], "trace method")
    frozen = Frozen(model, images, labels, masks)
    if method == "hutchinson":
        return _estimated_trace(frozen, probes, seed, reason="hutchinson was asked for")
    reasons = curved_parts(frozen, weights=True)
    if method == "auto" and frozen.classes > max_classes:
        reasons.append(f"{frozen.classes} classes, more than max_classes={max_classes}")
    cause = None
    if not reasons:
        try:
            return _exact_trace(frozen)
        except torch.OutOfMemoryError:  # says nothing of the network
            raise
        except RuntimeError as error:
            cause = error
            reasons = [f"torch.func cannot follow its forward pass ({str(error).strip().splitlines()[0]})"]
    if method == "exact":
        raise UserError(
            f"The exact weight-Hessian trace does not hold for this network: {'; '.join(reasons)}. Leave method at "
            "'auto': the trace is then estimated, with a standard error."
        ) from cause
    return _estimated_trace(frozen, probes, seed, "; ".join(reasons))


def _exact_trace(frozen: Frozen) -> WeightTrace:
    measures = {}  # factors of a squared gradient, (weights, 2): 1 or 0, and the squared weight
    for name, weight in frozen.weights.items():
        active = frozen.masks.get(name, torch.ones_like(weight)).to(weight.dtype)
        measures[name] = torch.stack([active.flatten(), weight.flatten().square()], dim=1)

    def squared_gradients(image: Tensor) -> dict[str, Tensor]:
        """Return, per parameter, the sum over k of the squared gradient of v_k z, weighted, shape (2,)."""
        logits, pull = vjp(lambda w: frozen(image[None], w), frozen.weights)
        sums = {name: image.new_zeros(2) for name in measures}
        for direction in sample_factor(logits):
            for name, gradient in pull(direction)[0].items():
                sums[name] = sums[name] + gradient.flatten().square() @ measures[name]
        return sums

    bytes_per_image = 4 * sum(weight.numel() * weight.element_size() for weight in frozen.weights.values())
    chunk = max(1, min(50, JACOBIAN_BYTES // bytes_per_image))
    parts = [vmap(squared_gradients)(images) for images in frozen.images.split(chunk)]
    images = check_finite(torch.stack([torch.cat([part[name] for part in parts]) for name in measures]))
    trace, relative = images.sum(0).unbind(1)
    return _trace(frozen, images.double().mean(1), per_image=trace, relative_per_image=relative)


def _trace(frozen: Frozen, shares: Tensor, **found: object) -> WeightTrace:
    """Return what is known of the trace from the parameters' shares of it and of relative flatness, (parameters, 2)."""
    total, relative = shares.sum(0).tolist()
    active = {name: frozen.active(name) for name in frozen.weights}
    return WeightTrace(
        total, relative, active, *(dict(zip(active, s.tolist(), strict=True)) for s in shares.T), **found
    )


def _estimated_trace(frozen: Frozen, probes: int, seed: int, reason: str) -> WeightTrace:
    """Estimate tr(M H M) by Hutchinson's probes, whose spread is the standard error."""
    if probes < 2:
        raise UserError("A standard error needs at least two independent probes.")
    hessian, rows = WeightHessian(frozen), []
    weights = hessian.weights()
    for probe in range(probes):
        signs = rademacher_like(weights, seed, probe)
        diagonal = (signs * (hessian @ signs)).double()
        each = (diagonal, diagonal * weights.square())
        rows.append([[float(part.sum()) for part in values.split(hessian.sizes)] for values in each])
    estimates = torch.tensor(rows, dtype=torch.float64)  # probes, trace or relative flatness, parameters
    errors = (estimates.sum(2).std(0) / probes**0.5).tolist()
    found = dict(zip(("standard_error", "relative_standard_error"), errors, strict=True))
    return _trace(frozen, estimates.mean(0).T, method="hutchinson", reason=reason, **found)


def input_hessian_trace(
    model: nn.Module, images: Tensor, labels: Tensor, *, probes: int = 30, seed: int = 0
) -> InputHessian:
    """Return trace and top eigenvalue of every image's Hessian in its pixels (lower is flatter).

    Each image's own cross-entropy is differentiated, not the batch's mean, in [0, 1] pixels, before the normalisation
    inside the network. Exact for a piecewise-linear network, from C - 1 vector-Jacobian products and one (C - 1) x (C -
    1) Gram matrix per image, whatever the labels; estimated otherwise, and said so, from ``probes`` Hessian-vector
    products for the trace and as many for the eigenvalue.

    In float32 two processors agree to 1e-5 of each number, but for the few images with a ReLU within rounding of its
    kink: a trace or eigenvalue of such an image may differ by 1e-2 of itself.
    """
    frozen = Frozen(model, images, labels)
    reasons = curved_parts(frozen, weights=False)
    if reasons:
        return _estimated_input_hessian(frozen, probes, seed, "; ".join(reasons))
    bytes_per_image = frozen.classes * images[0].numel() * images.element_size()
    chunk = max(1, min(100, JACOBIAN_BYTES // bytes_per_image))
    eigenvalues = torch.cat([_input_eigenvalues(frozen, part) for part in images.split(chunk)])
    zeros = torch.zeros_like(eigenvalues[:, 0])
    return InputHessian(eigenvalues.sum(1), eigenvalues[:, -1], "exact", zeros, zeros)


def _input_eigenvalues(frozen: Frozen, images: Tensor) -> Tensor:
    """Return the C - 1 eigenvalues of each image's Hessian that can differ from 0, ascending."""
    pixels = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = check_finite(frozen(pixels))
    rows = [grad(logits, pixels, v, retain_graph=True)[0].flatten(1) for v in sample_factor(logits.detach())]
    jacobian = torch.stack(rows, dim=1)
    return torch.linalg.eigvalsh(jacobian @ jacobian.transpose(1, 2))


def _estimated_input_hessian(frozen: Frozen, probes: int, seed: int, reason: str) -> InputHessian:
    """Estimate each image's trace by Hutchinson's probes and its top eigenvalue by Lanczos, all at once.

    The Hessian of the summed loss is block diagonal over images, so one product serves every image.
    """
    if probes < 2:
        raise UserError("A standard error needs at least two probes.")
    pixels = frozen.images.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(check_finite(frozen(pixels)), frozen.labels, reduction="sum")
        (gradient,) = grad(loss, pixels, create_graph=True)

    def product(vectors: Tensor) -> Tensor:
        with twice_differentiable():
            return grad(gradient, pixels, vectors.view_as(pixels), retain_graph=True)[0].flatten(1)

    like = frozen.images.flatten(1)
    signs = [rademacher_like(like, seed, probe) for probe in range(probes)]
    traces = torch.stack([(v * product(v)).sum(1) for v in signs])
    start = normal_like(like, seed, probes)
    *_, (alphas, betas) = lanczos(product, start, probes, start.dtype)
    values, vectors = tridiagonal(alphas, betas)
    residual = betas[:, -1] * vectors[:, -1, -1].abs()
    error = traces.std(0) / probes**0.5
    return InputHessian(traces.mean(0), values[:, -1], "hutchinson+lanczos", error, residual, reason)


def sample_factor(logits: Tensor) -> Tensor:
    r"""Return v_1..v_{C-1} with diag(p) - p pᵀ = Σ_k v_k v_kᵀ, the softmax's Hessian, for each image.

    With s = √p, diag(p) - p pᵀ = diag(s) (I - s sᵀ) diag(s). The reflection that takes s to -e_C has C - 1 further
    columns, an orthonormal basis of what is orthogonal to s; they are scaled by s. No eigenvalue problem is solved, and
    a probability near 1 or 0 costs no accuracy beyond rounding. (N, C) -> (C - 1, N, C).
    """
    s = torch.softmax(logits, dim=1).sqrt()
    u = s.clone()
    u[:, -1] += 1
    reflection = torch.eye(s.shape[1], dtype=s.dtype, device=s.device) - (
        u[:, :, None] * u[:, None, :] / (1 + s[:, -1])[:, None, None]
    )
    return (s[:, :, None] * reflection[:, :, :-1]).permute(2, 0, 1)


def curved_parts(frozen: Frozen, weights: bool) -> list[str]:
    """Say what keeps the logits from being piecewise affine in the pixels (and in each parameter); empty: nothing.

    It is tried on a few images, in a random direction. Where they are affine, second derivatives are exactly zero:
    PyTorch's derivatives of ReLU, pooling, convolution and the like hold no rounding there. They are not behind a
    smooth activation, a product or quotient of things that depend on the image, or a weight that is used twice. One
    that is not zero is seen with probability one, unless it is switched off for all of the few images.
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
