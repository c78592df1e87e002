r"""Hessian traces of the cross-entropy, in the weights and in the pixels: exact where they can be, else estimated.

In a piecewise-linear network every logit z_c is affine in each single weight w_j (and in each pixel), away from
kinks, so d²z_c/dw_j² = 0. The chain rule then leaves, on the diagonal, the Gauss-Newton part alone:

    d²L/dw_j² = 1/N Σ_i (dz_i/dw_j)ᵀ (diag(p_i) - p_i p_iᵀ) (dz_i/dw_j) = 1/N Σ_i Σ_k (v_ikᵀ dz_i/dw_j)²,

where v_i1 .. v_i,C-1 factor the softmax's Hessian (`sample_factor`). So C - 1 vector-Jacobian products with
the squared gradient of every image give every diagonal entry of the Hessian, with no randomness. In the
pixels more holds: logits are affine in all pixels at once, so the Hessian *is* its Gauss-Newton part, and its
eigenvalues are those of a (C - 1) x (C - 1) Gram matrix. Whether a network is piecewise linear is tried, see
`lthlib.metrics.flatness.gradients`.

Networks, images (N, channels, height, width) in [0, 1], labels (N,) and masks are as `Frozen` takes them; the network
is measured in evaluation mode and left as it was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import vjp, vmap

from lthlib.core.errors import UserError, choose
from lthlib.metrics.flatness.frozen import Frozen, check_finite, normal_like, rademacher_like, twice_differentiable
from lthlib.metrics.flatness.gradients import curved_parts
from lthlib.metrics.flatness.spectrum import WeightHessian, lanczos, tridiagonal

JACOBIAN_BYTES = 2**28  # of as many images as are taken at a time


@dataclass(frozen=True)
class WeightTrace:
    """The trace of the weight Hessian of the mean cross-entropy, and the parts it is made of.

    Attributes:
        total: tr(M H M) in nats; M keeps the active weights.
        relative: Σ_j w_j² H_jj over the active weights, in nats: unchanged when a layer is rescaled and the
            next normalisation undoes it, as the total is not. What is called ``relative_*`` below belongs to it.
        method: ``"exact"`` or ``"hutchinson"``, which is an estimate.
        standard_error: Of ``total`` from the random probes; 0 for the exact method. What another batch of images
            would change is another matter, see `lthlib.figures.flatness.image_interval`.
        reason: Why it was estimated; empty for the exact method.
        active: Parameter name -> number of its weights that no mask removes.
        per_parameter: Parameter name -> its share of the total.
        per_image: Contribution of each image, shape (N,), with mean ``total``; None from an estimator.
    """

    total: float
    relative: float
    method: str = "exact"
    standard_error: float = 0.0
    relative_standard_error: float = 0.0
    reason: str = ""
    active: dict[str, int] = field(default_factory=dict, repr=False)
    per_parameter: dict[str, float] = field(default_factory=dict, repr=False)
    relative_per_parameter: dict[str, float] = field(default_factory=dict, repr=False)
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

        The joint Hessian of the mean loss is block diagonal with blocks H_i / N, so this number halves when
        the batch is doubled with images no sharper.
        """
        return float(self.top.max()) / len(self.top)


# ------------------------------------------------------------------------------------------------ the weights


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

    It is the Hessian of the mean cross-entropy over the batch in all parameters, restricted to the active ones, at
    the masked weights. The exact method takes C - 1 vector-Jacobian products; memory is bounded, whatever
    the number of images. In a piecewise-linear network the trace does not depend on the labels. In float32 two
    processors round differently: expect exact traces to agree to 1e-5 of themselves.

    Args:
        model: Any network that can be differentiated twice.
        method: ``"exact"``, ``"hutchinson"`` (an estimate from random probes), or ``"auto"``: exact for a
            piecewise-linear network of at most ``max_classes`` classes, else ``"hutchinson"``.
        max_classes: Where ``"auto"`` stops paying one vector-Jacobian product per class.
        probes: Hessian-vector products of the estimator.
        seed: Of the estimator.

    Raises:
        UserError: For an unknown method, for ``"exact"`` where it does not hold, a loss that is not finite, an
            operation without second derivative, and what `Frozen` refuses.
    """
    choose(method, ["auto", "exact", "hutchinson"], "trace method")
    frozen = Frozen(model, images, labels, masks)
    if method == "hutchinson":
        return _estimated_trace(frozen, probes, seed, reason="hutchinson was asked for")
    reasons = curved_parts(frozen, weights=True)
    if method == "exact" and reasons:
        raise _refused(reasons)
    if method == "auto" and frozen.classes > max_classes:
        reasons.append(f"{frozen.classes} classes, more than max_classes={max_classes}")
    if not reasons:
        try:
            return _exact_trace(frozen)
        except RuntimeError as error:
            reasons = [f"torch.func cannot follow its forward pass ({str(error).strip().splitlines()[0]})"]
            if method == "exact":
                raise _refused(reasons) from error
    return _estimated_trace(frozen, probes, seed, "; ".join(reasons))


def _refused(reasons: list[str]) -> UserError:
    return UserError(
        f"The exact weight-Hessian trace does not hold for this network: {'; '.join(reasons)}. Leave method at "
        "'auto': the trace is then estimated, with a standard error."
    )


def _exact_trace(frozen: Frozen) -> WeightTrace:
    measures = {name: _measures(weight, frozen.masks.get(name)) for name, weight in frozen.weights.items()}

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
    images = {name: check_finite(torch.cat([part[name] for part in parts])) for name in measures}
    shares = {name: value.double().mean(0).tolist() for name, value in images.items()}
    per_image = torch.stack(list(images.values())).sum(0)
    total, relative = (math.fsum(share[i] for share in shares.values()) for i in (0, 1))
    return WeightTrace(
        total=total,
        relative=relative,
        active={name: frozen.active(name) for name in shares},
        per_parameter={name: share[0] for name, share in shares.items()},
        relative_per_parameter={name: share[1] for name, share in shares.items()},
        per_image=per_image[:, 0],
        relative_per_image=per_image[:, 1],
    )


def _measures(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Return the factors of a squared gradient, shape (weights, 2): 1 or 0, and the squared weight."""
    active = torch.ones_like(weight) if mask is None else mask.to(weight.dtype)
    return torch.stack([active.flatten(), weight.flatten().square()], dim=1)


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
    totals, shares = estimates.sum(2), estimates.mean(0)
    error = totals.std(0) / probes**0.5
    return WeightTrace(
        total=float(totals[:, 0].mean()),
        relative=float(totals[:, 1].mean()),
        method="hutchinson",
        standard_error=float(error[0]),
        relative_standard_error=float(error[1]),
        reason=reason,
        active={name: frozen.active(name) for name in frozen.weights},
        per_parameter=dict(zip(frozen.weights, shares[0].tolist(), strict=True)),
        relative_per_parameter=dict(zip(frozen.weights, shares[1].tolist(), strict=True)),
    )


# ------------------------------------------------------------------------------------------------- the pixels


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
    *_, (alphas, betas) = lanczos(product, start, min(probes, start.shape[1]), start.dtype)
    values, vectors = tridiagonal(alphas, betas)
    residual = betas[:, -1] * vectors[:, -1, -1].abs()
    error = traces.std(0) / probes**0.5
    return InputHessian(traces.mean(0), values[:, -1], "hutchinson+lanczos", error, residual, reason)


def sample_factor(logits: Tensor) -> Tensor:
    r"""Return v_1..v_{C-1} with diag(p) - p pᵀ = Σ_k v_k v_kᵀ, the softmax's Hessian, for each image.

    With s = √p, diag(p) - p pᵀ = diag(s) (I - s sᵀ) diag(s). The reflection that takes s to -e_C has C - 1
    further columns, an orthonormal basis of what is orthogonal to s; they are scaled by s. No
    eigenvalue problem is solved, and a probability near 1 or 0 costs no accuracy beyond rounding. (N, C) -> (C - 1, N,
    C).
    """
    s = torch.softmax(logits, dim=1).sqrt()
    u = s.clone()
    u[:, -1] += 1
    reflection = torch.eye(s.shape[1], dtype=s.dtype, device=s.device) - (
        u[:, :, None] * u[:, None, :] / (1 + s[:, -1])[:, None, None]
    )
    return (s[:, :, None] * reflection[:, :, :-1]).permute(2, 0, 1)
