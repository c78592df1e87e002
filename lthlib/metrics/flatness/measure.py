"""Flatness: how curved the loss is in the weights and in the pixels, and how much noise both bear.

The rows of the dimension. What they rest on is in the files beside this one: `exact` (traces), `spectrum` (eigenvalues
and density), `noise`, `landscape` (barrier, pictures, rescaling).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lthlib.metrics import Value, metric
from lthlib.metrics.flatness import landscape
from lthlib.metrics.flatness.exact import hessian_trace, input_hessian_trace
from lthlib.metrics.flatness.frozen import Frozen
from lthlib.metrics.flatness.noise import input_noise_tolerance, weight_noise_tolerance
from lthlib.metrics.flatness.spectrum import WeightHessian, spectral_density, top_eigenvalue
from lthlib.metrics.registry import Found, values
from lthlib.metrics.resampling import kept, resampled_mean, resamples
from lthlib.tickets.subject import Subject
from lthlib.training.loop import as_input

_row = partial(metric, dimension="flatness", higher_is_better=False, unit="nats")
_row("weight_hessian_trace", "Weight-Hessian trace", reference="yao2020pyhessian", in_verdict=True)(
    r"$\operatorname{tr}(MHM)$, $H$ the Hessian of the mean cross-entropy of a fixed batch in all parameters, $M$ the "
    "mask; exact for piecewise-linear networks."
)
_row("weight_hessian_trace_per_weight", "Weight-Hessian trace per active weight", reference="yao2020pyhessian")(
    "$\\operatorname{tr}(MHM)$ divided by the number of active parameters."
)
_row("weight_hessian_top", "Weight-Hessian top eigenvalue", reference="ghorbani2019investigation")(
    "The largest (signed) eigenvalue of $MHM$, by Lanczos, with a bound on its error."
)
_row("relative_flatness", "Relative flatness", reference="tsuzuku2020normalized")(
    r"$\sum_j w_j^2 H_{jj}$ over the active parameters: unchanged when a layer is rescaled and the next normalisation "
    r"undoes it; for small $\sigma$, noise $\sigma|w_j|\varepsilon_j$ raises the loss by $\tfrac12\sigma^2$ times this."
)
_row("input_hessian_trace", "Input-Hessian trace", unit="nats/pixel²", reference="yao2020pyhessian", in_verdict=True)(
    r"The mean over images of $\operatorname{tr}(H_i)$, $H_i$ the Hessian of image $i$'s cross-entropy in its $[0,1]$ "
    "pixels; exact for piecewise-linear networks."
)
_row("input_hessian_top", "Input-Hessian top eigenvalue", unit="nats/pixel²", reference="yao2020pyhessian")(
    "The mean over images of $\\lambda_{\\max}(H_i)$ in $[0,1]$ pixels."
)
_row(
    "legacy_batch_eigenvalue", "Input-Hessian top eigenvalue, as published", unit="nats/pixel²", reference="chen2022can"
)(
    r"$\max_i\lambda_{\max}(H_i)/B$, the top eigenvalue of the mean loss of a batch of $B$ in all its pixels: depends "
    "on $B$."
)
_row("pac_bayes_weight_sigma", "Weight noise borne", higher_is_better=True, unit="", reference="jiang2020fantastic")(
    r"The largest $\sigma$ with $\mathbb{E}\,L(w+\sigma|w|\varepsilon)\le1.1\,L(w)$, $\varepsilon$ standard normal, on "
    "convolution weights."
)
_row("pac_bayes_input_sigma", "Input noise borne", higher_is_better=True, unit="pixel", reference="chen2022can")(
    r"The largest $\sigma$ with $\mathbb{E}\,L(\operatorname{clamp}(x+\sigma\varepsilon,0,1))\le1.1\,L(x)$, pixels in "
    "$[0,1]$."
)
_row("loss_barrier", "Loss barrier to the dense network", reference="frankle2020linear")(
    "$\\max_t[L(w_t)-(1-t)L(w_0)-tL(w_1)]$ on the straight line $w_t$ between two networks."
)
_row("error_barrier", "Error barrier to the dense network", unit="fraction", reference="frankle2020linear")(
    "$\\max_t[E(w_t)-(1-t)E(w_0)-tE(w_1)]$, $E$ the fraction misclassified."
)

RESCALED_BY = (0.5, 3.0)
SPAN = 0.5  # of a surface, in norms of the network's own filters

Batch = tuple[Tensor, Tensor]


def measure(
    subject: Subject,
    *,
    n_weights: int = 200,
    n_spectrum: int = 200,
    n_pixels: int = 200,
    n_noise: int = 500,
    n_path: int = 1000,
    pairs: int = 8,
    points: int = 11,
    statistics: str = "interpolate",
    tolerance: float = 1e-2,
    partner: int | None = None,
    pictured: Sequence[int] = (),
    pictured_seed: int = 0,
    n_wide: int = 1000,
    probes: int = 4,
    steps: int = 30,
    surface_points: int = 21,
    batch_seed: int = 0,
) -> Found:
    """Measure how flat the loss is around a ticket, in its weights and in its pixels.

    All is measured on training images, as in the paper, un-augmented, drawn at random once for all tickets: a smaller
    number takes the first of the larger. (The published code takes the data set's first 200, all of a class if sorted.)

    Args:
        subject: The ticket.
        n_weights: Images for the weight-Hessian trace.
        n_spectrum: Images for the top eigenvalue and the spectral density.
        n_pixels: Images for the input Hessians.
        n_noise: Images for the noise borne.
        n_path: Images for the line between two networks, and for the surfaces.
        pairs: Independent draws of the noise, each with both signs.
        points: Positions on a line.
        statistics: Batch norm's running statistics on the line, see `landscape.interpolate`.
        tolerance: Relative error at which Lanczos stops.
        partner: A seed to whose ticket of the same description a line is drawn as well; None for no such line.
        pictured, pictured_seed: Rounds (0: dense) and seed of which density, surfaces and rescaling are recorded too.
        n_wide: Images for the weight-Hessian trace of a pictured ticket, image by image.
        probes, steps: Start vectors of the spectral density, and Lanczos steps of each.
        surface_points: Points along each side of a surface.
        batch_seed: Of the draw of images.

    Returns:
        Values, and for figures: ``weight_per_image`` and ``weight_relative_per_image``; ``layers`` with
        ``layer_trace``, ``layer_relative``, ``layer_active``; ``input_traces``; ``weight_method`` with
        ``weight_standard_error`` (of trace and relative flatness), and ``input_method``; ``top_bound`` and
        ``top_magnitude`` (the eigenvalue farthest from 0, signed); ``weight_sigma`` and ``input_sigma`` (low, high);
        ``dense_t``, ``dense_loss``, ``dense_error`` (the line to the dense network) and the same with ``partner_``; of
        pictured tickets ``density_at`` and ``density``, the traces of more images (``wide_per_image``), and what
        `_pictures` and `_rescaled` return.
    """
    model, masks = subject.model, subject.masks
    draw = partial(_training_images, subject, seed=batch_seed)
    parts = [
        _of_weights(model, draw(n_weights), masks),
        _of_spectrum(model, draw(n_spectrum), masks, tolerance),
        _of_pixels(model, draw(n_pixels)),
        _of_noise(model, draw(n_noise), masks, pairs),
        _of_lines(subject, draw(n_path), points, statistics, partner),
    ]
    if subject.ticket.round in pictured and subject.ticket.seed == pictured_seed:
        hessian = WeightHessian(Frozen(model, *draw(n_spectrum), masks))
        at, density = spectral_density(hessian, probes=probes, steps=steps, points=500)
        pictures = _pictures(model, draw(n_path), masks, surface_points)
        wide = hessian_trace(model, *draw(n_wide), masks).per_image
        wide = {} if wide is None else {"wide_per_image": _small(wide)}
        shares = dict(zip(parts[0][1]["layers"].tolist(), parts[0][1]["layer_trace"], strict=True))
        rescaled = _rescaled(model, draw(n_weights), masks, shares)
        parts.append(([], {"density_at": at, "density": density, **pictures, **wide, **rescaled}))
    return [value for found, _ in parts for value in found], {k: v for _, arrays in parts for k, v in arrays.items()}


def _training_images(subject: Subject, n: int, seed: int) -> Batch:
    """Return n training images and labels: the first n of one random order."""
    train = subject.data.train
    which = torch.from_numpy(np.random.default_rng(seed).permutation(len(train.labels))[:n])
    device = next(subject.model.parameters()).device
    return as_input(train.pixels[which]).to(device), train.labels[which].to(device)


def _of_weights(model: nn.Module, batch: Batch, masks: Mapping[str, Tensor] | None) -> Found:
    found = hessian_trace(model, *batch, masks)
    numbers = {"weight_hessian_trace": found.total, "weight_hessian_trace_per_weight": found.per_weight}
    n = len(batch[1])
    measured = values(numbers | {"relative_flatness": found.relative}, n)
    parts = {"trace": found.per_parameter, "relative": found.relative_per_parameter, "active": found.active}
    layers = pd.DataFrame(parts).groupby(lambda name: name.rpartition(".")[0], sort=False).sum()
    arrays = {
        "weight_method": np.array(found.method),
        "weight_standard_error": np.array([found.standard_error, found.relative_standard_error]),
        "layers": np.array(layers.index, dtype=str),
        **{f"layer_{name}": column.to_numpy() for name, column in layers.items()},
    }
    if found.per_image is not None:
        arrays["weight_per_image"] = _small(found.per_image)
        arrays["weight_relative_per_image"] = _small(found.relative_per_image)
        for value, terms in zip(measured[::2], (found.per_image, found.relative_per_image), strict=True):
            arrays |= kept(value, resampled_mean(terms.cpu(), resamples(n, "train")))
    return measured, arrays


def _of_spectrum(model: nn.Module, batch: Batch, masks: Mapping[str, Tensor] | None, tolerance: float) -> Found:
    hessian = WeightHessian(Frozen(model, *batch, masks))
    found = top_eigenvalue(hessian, near=hessian.gradient(), tolerance=tolerance)
    bound = {"top_bound": np.array([found.error_bound]), "top_magnitude": np.array([found.largest_magnitude])}
    return [Value("weight_hessian_top", found.top, len(batch[1]))], bound


def _of_pixels(model: nn.Module, batch: Batch) -> Found:
    found = input_hessian_trace(model, *batch)
    numbers = {
        "input_hessian_trace": float(found),
        "input_hessian_top": float(found.top.double().mean()),
        "legacy_batch_eigenvalue": found.legacy_batch_eigenvalue,
    }
    n = len(batch[1])
    measured = values(numbers, n)
    arrays = {"input_traces": _small(found.trace), "input_method": np.array(found.method)}
    return measured, arrays | kept(measured[0], resampled_mean(found.trace.cpu(), resamples(n, "train")))


def _of_noise(model: nn.Module, batch: Batch, masks: Mapping[str, Tensor] | None, pairs: int) -> Found:
    borne = {
        "weight": weight_noise_tolerance(model, *batch, masks, pairs=pairs),
        "input": input_noise_tolerance(model, *batch, pairs=pairs),
    }
    numbers = {f"pac_bayes_{kind}_sigma": found.sigma for kind, found in borne.items()}
    arrays = {f"{kind}_sigma": np.array([found.low, found.high]) for kind, found in borne.items()}
    return values(numbers, len(batch[1])), arrays


def _of_lines(subject: Subject, batch: Batch, points: int, statistics: str, partner: int | None) -> Found:
    """Walk from the dense network to the ticket, and from the partner's ticket to it; 0 barrier to itself."""
    starts = {"dense": subject.parent, "partner": None if partner is None else subject.sibling(partner)}
    end, lines = subject.model.state_dict(), {}
    for name, network in starts.items():
        start = {} if network is None else network.to(batch[0].device).state_dict()
        if {key: value.shape for key, value in start.items()} == {key: value.shape for key, value in end.items()}:
            lines[name] = landscape.interpolate(subject.model, start, end, *batch, points, statistics)
    arrays = {f"{name}_{part}": array for name, line in lines.items() for part, array in vars(line).items()}
    barriers = {"loss_barrier": 0.0, "error_barrier": 0.0}
    if not subject.is_dense:  # there is no line to a dense network whose layers have other widths
        barriers = {name: getattr(lines["dense"], name) for name in barriers if "dense" in lines}
    return values(barriers, len(batch[1])), arrays


def _pictures(model: nn.Module, batch: Batch, masks: Mapping[str, Tensor] | None, points: int) -> dict[str, np.ndarray]:
    """Return ``surface_a``, ``surface_b``, ``surface_loss`` in the weights, and ``slice_...`` in the pixels."""
    surfaces = {
        "surface": landscape.filter_normalised_surface(model, *batch, masks, SPAN, points),
        "slice": landscape.adversarial_slice(model, *batch, points=points),
    }
    return {f"{name}_{part}": _small(array) for name, found in surfaces.items() for part, array in vars(found).items()}


def _rescaled(
    model: nn.Module, batch: Batch, masks: Mapping[str, Tensor] | None, shares: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """Measure a ticket that computes the same with other weights, see `landscape.rescale_conv`.

    ``rescaled_layer`` is, of the convolutions with a norm behind, the one with the largest of ``shares``. For each of
    ``rescaled_factor`` there are ``rescaled_trace``, ``rescaled_relative`` and ``rescaled_change``: the largest change
    of a logit, relative to the largest logit. Nothing where no convolution has a norm.
    """
    convolutions = [name for name in landscape.norms_behind(model, batch[0]) if name in shares]
    if not convolutions:
        return {}
    layer = max(convolutions, key=lambda name: shares[name])
    rows = []
    for factor in RESCALED_BY:
        other = landscape.rescale_conv(model, layer, factor, batch[0])
        with torch.no_grad():
            logits, same = model(batch[0]), other(batch[0])
        found = hessian_trace(other, *batch, masks)
        rows.append((found.total, found.relative, float((same - logits).abs().max() / logits.abs().max())))
    columns = dict(zip(("trace", "relative", "change"), np.array(rows).T, strict=True))
    arrays = {f"rescaled_{name}": column for name, column in columns.items()}
    return {"rescaled_layer": np.array(layer), "rescaled_factor": np.array(RESCALED_BY), **arrays}


def _small(values: Tensor | np.ndarray) -> np.ndarray:
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.float32)
