"""Flatness: how curved the loss is in the weights and in the pixels, and how much noise both bear.

The rows of the dimension, and the two traces that choose their own method. What they rest on is in the files
beside this one: `hessian` (exact traces), `piecewise` (whether they apply), `spectrum` (eigenvalues, density,
estimators), `pacbayes` (noise), `landscape` (pictures and the barrier).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lthlib.errors import UserError, choose
from lthlib.metrics import describe
from lthlib.metrics.frozen import Frozen
from lthlib.metrics.hessian import (
    InputHessian,
    WeightTrace,
    exact_input_hessian,
    exact_trace,
    image_interval,
    rescale_conv,
    trace_obstacles,
    weight_hessian_trace,
)
from lthlib.metrics.landscape import (
    LossPath,
    LossSurface,
    adversarial_slice,
    filter_normalised_surface,
    interpolate,
)
from lthlib.metrics.pacbayes import NoiseTolerance, input_noise_tolerance, weight_noise_tolerance
from lthlib.metrics.piecewise import is_piecewise_linear, nonlinear_parts
from lthlib.metrics.spectrum import (
    TRACE_ESTIMATORS,
    Extremes,
    SpectralDensity,
    WeightHessian,
    estimate_input_hessian,
    estimate_trace,
    spectral_density,
    top_eigenvalues,
)

__all__ = [
    "Extremes",
    "InputHessian",
    "LossPath",
    "LossSurface",
    "NoiseTolerance",
    "SpectralDensity",
    "WeightHessian",
    "WeightTrace",
    "adversarial_slice",
    "filter_normalised_surface",
    "image_interval",
    "input_hessian",
    "input_noise_tolerance",
    "interpolate",
    "is_piecewise_linear",
    "nonlinear_parts",
    "rescale_conv",
    "spectral_density",
    "top_eigenvalues",
    "weight_hessian_trace",
    "weight_noise_tolerance",
    "weight_trace",
]

describe(
    "weight_hessian_trace", "Weight-Hessian trace", dimension="flatness", higher_is_better=False, unit="nats",
    definition="$\\operatorname{tr}(MHM)$, $H$ the Hessian of the mean cross-entropy of a fixed batch in all "
    "parameters, $M$ the mask; exact for piecewise-linear networks.",
    reference="yao2020pyhessian", in_verdict=True,
)  # fmt: skip
describe(
    "weight_hessian_trace_per_weight", "Weight-Hessian trace per active weight", dimension="flatness",
    higher_is_better=False, unit="nats",
    definition="$\\operatorname{tr}(MHM)$ divided by the number of active parameters.",
    reference="yao2020pyhessian",
)  # fmt: skip
describe(
    "weight_hessian_top", "Weight-Hessian top eigenvalue", dimension="flatness", higher_is_better=False,
    unit="nats",
    definition="The largest (signed) eigenvalue of $MHM$, by Lanczos, with a bound on its error.",
    reference="ghorbani2019investigation",
)  # fmt: skip
describe(
    "relative_flatness", "Relative flatness", dimension="flatness", higher_is_better=False, unit="nats",
    definition="$\\sum_j w_j^2 H_{jj}$ over the active parameters: unchanged when a layer is rescaled and "
    "the next normalisation undoes it; for small $\\sigma$, noise $\\sigma|w_j|\\varepsilon_j$ raises the "
    "loss by $\\tfrac12\\sigma^2$ times this.",
    reference="tsuzuku2020normalized",
)  # fmt: skip
describe(
    "input_hessian_trace", "Input-Hessian trace", dimension="flatness", higher_is_better=False,
    unit="nats/pixel²",
    definition="The mean over images of $\\operatorname{tr}(H_i)$, $H_i$ the Hessian of image $i$'s "
    "cross-entropy in its $[0,1]$ pixels; exact for piecewise-linear networks.",
    reference="yao2020pyhessian", in_verdict=True,
)  # fmt: skip
describe(
    "input_hessian_top", "Input-Hessian top eigenvalue", dimension="flatness", higher_is_better=False,
    unit="nats/pixel²", definition="The mean over images of $\\lambda_{\\max}(H_i)$ in $[0,1]$ pixels.",
    reference="yao2020pyhessian",
)  # fmt: skip
describe(
    "legacy_batch_eigenvalue", "Input-Hessian top eigenvalue, as published", dimension="flatness",
    higher_is_better=False, unit="nats/pixel²",
    definition="$\\max_i\\lambda_{\\max}(H_i)/B$, the top eigenvalue of the mean loss of a batch of $B$ in "
    "all its pixels: depends on $B$.",
    reference="chen2022can",
)  # fmt: skip
describe(
    "pac_bayes_weight_sigma", "Weight noise borne", dimension="flatness", higher_is_better=True, unit="",
    definition="The largest $\\sigma$ with $\\mathbb{E}\\,L(w+\\sigma|w|\\varepsilon)\\le1.1\\,L(w)$, "
    "$\\varepsilon$ standard normal, on convolution weights.",
    reference="jiang2020fantastic",
)  # fmt: skip
describe(
    "pac_bayes_input_sigma", "Input noise borne", dimension="flatness", higher_is_better=True, unit="pixel",
    definition="The largest $\\sigma$ with $\\mathbb{E}\\,L(\\operatorname{clamp}(x+\\sigma\\varepsilon,0,1))"
    "\\le1.1\\,L(x)$, pixels in $[0,1]$.",
    reference="chen2022can",
)  # fmt: skip
describe(
    "loss_barrier", "Loss barrier to the dense network", dimension="flatness", higher_is_better=False,
    unit="nats",
    definition="$\\max_t[L(w_t)-(1-t)L(w_0)-tL(w_1)]$ on the straight line $w_t$ between two networks.",
    reference="frankle2020linear",
)  # fmt: skip
describe(
    "error_barrier", "Error barrier to the dense network", dimension="flatness", higher_is_better=False,
    unit="fraction",
    definition="$\\max_t[E(w_t)-(1-t)E(w_0)-tE(w_1)]$, $E$ the fraction misclassified.",
    reference="frankle2020linear",
)  # fmt: skip


def weight_trace(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Mapping[str, Tensor] | None = None,
    method: str = "auto",
    chunk: int = 10,
    max_classes: int = 200,
    probes: int = 30,
    repeats: int = 5,
    seed: int = 0,
) -> WeightTrace:
    """Return the trace of the weight Hessian (lower is flatter), exact where possible, else estimated.

    Args:
        model: As in `weight_hessian_trace`, with any parts that can be differentiated twice.
        images: Pixels in [0, 1], shape (N, channels, height, width).
        labels: Class indices, shape (N,).
        masks: Parameter name -> bool tensor, True where a weight is active; None for a dense network.
        method: ``"exact"``, an estimator of curvlinops (``"hutchinson"``, which also gives shares per
            parameter; ``"hutchpp"``, ``"xtrace"``), or ``"auto"``: exact for a piecewise-linear network of at
            most ``max_classes`` classes, ``"hutchinson"`` otherwise.
        chunk: Images at a time, exact method only.
        max_classes: Where ``"auto"`` stops paying one vector-Jacobian product per class.
        probes: Hessian-vector products of the estimator; of each repeat of Hutch++ and XTrace.
        repeats: Independent runs of Hutch++ or XTrace, which give their standard error.
        seed: Of the estimator.

    Returns:
        A result that names its ``method``, its ``standard_error`` and the ``reason`` for an estimator.

    Raises:
        UserError: For an unknown method, and as in `weight_hessian_trace`.
    """
    choose(method, ["auto", "exact", *TRACE_ESTIMATORS], "trace method")
    if method == "exact":
        return weight_hessian_trace(model, images, labels, masks, chunk)
    frozen = Frozen(model, images, labels, masks)
    if method != "auto":
        return estimate_trace(frozen, method, probes, repeats, seed, reason=f"{method} was asked for")
    reasons = list(trace_obstacles(frozen))
    if frozen.classes > max_classes:
        reasons.append(f"{frozen.classes} classes, more than max_classes={max_classes}")
    if reasons:
        return estimate_trace(frozen, "hutchinson", probes, repeats, seed, reason="; ".join(reasons))
    return exact_trace(frozen, chunk)


def input_hessian(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    chunk: int | None = None,
    probes: int = 30,
    seed: int = 0,
) -> InputHessian:
    """Return trace and top eigenvalue of every image's Hessian in its pixels (lower is flatter).

    Each image's own cross-entropy is differentiated, not the batch's mean, in [0, 1] pixels, before the
    normalisation inside the network. Exact for a piecewise-linear network; estimated otherwise, and said so.

    Args:
        model: Network in the mode in which it is to be measured.
        images: Pixels in [0, 1], shape (N, channels, height, width).
        labels: Class indices, shape (N,); in a piecewise-linear network they do not matter.
        chunk: Images at a time, exact method only; None: as many as keep their Jacobians below 256 MB.
        probes: Hessian-vector products for the trace, and as many for the eigenvalue; estimator only.
        seed: Of the estimator.

    Returns:
        The numbers per image; ``legacy_batch_eigenvalue`` is the one of the paper's code.

    Raises:
        UserError: For training-mode batch norm, which couples the images, a loss that is not finite, and what
            `Frozen` refuses.
    """
    frozen = Frozen(model, images, labels)
    obstacles = nonlinear_parts(model, images)
    if any("batch norm" in part for part in obstacles):
        raise UserError("Training-mode batch norm couples the images of a batch: call model.eval() first.")
    if obstacles:
        return estimate_input_hessian(frozen, probes, seed, reason="; ".join(obstacles))
    return exact_input_hessian(frozen, chunk)
