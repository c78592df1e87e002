"""PAC-Bayes flatness: how much noise the weights, or the pixels, bear before the loss rises by a tenth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lthlib.core.errors import UserError
from lthlib.metrics.flatness.frozen import Frozen, normal_like

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NoiseTolerance:
    """The largest noise that keeps the mean loss within its bound (higher is flatter).

    ``sigma`` is the noise level at which the mean loss over the draws first meets the bound, or ``sigma_max`` where it
    stays below. Its 95 % interval over independent draws (Student's t, delta method) reaches from ``low`` to ``high``,
    which is infinite where ``sigma_max`` was reached: ``sigma`` is then a lower bound. ``loss`` is the loss without
    noise.
    """

    sigma: float
    low: float
    high: float
    loss: float


def weight_noise_tolerance(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Mapping[str, Tensor] | None = None,
    *,
    pairs: int = 8,
    seed: int = 0,
    loss: Loss = F.cross_entropy,
) -> NoiseTolerance:
    """Find the largest σ, up to 5, with E[loss(w + σ ``|w|`` ε)] ≤ 1.1 loss(w), ε normal (higher is flatter).

    Noise goes on the weights of convolutions (4-D parameters) in proportion to their magnitude, so that pruned ones
    stay 0, and a rescaled layer keeps its σ. The same draws serve every σ (common random numbers: the mean is a smooth
    function of σ), each with its negative (the odd terms of the expansion cancel), ``pairs`` in all. The published code
    draws anew at every step of its bisection, may return a σ that violates the bound, and leaves the weights perturbed.

    Model, images, labels and masks are as `Frozen` takes them; ``loss`` is a mean over (logits, labels). `UserError`
    for a loss without noise that is zero, negative or not finite, fewer than two pairs, a network without convolutions,
    and as in `Frozen`.
    """
    frozen = Frozen(model, images, labels, masks)
    noisy = {name: w for name, w in frozen.weights.items() if w.dim() == 4}
    if not noisy:
        raise UserError("Weight noise goes on convolutions, and the network has none.")

    def pair_mean(sigma: float, pair: int) -> float:
        noise = {n: w.abs() * normal_like(w, seed, pair, place) for place, (n, w) in enumerate(noisy.items())}
        signs = ({name: w + s * noise[name] for name, w in noisy.items()} for s in (sigma, -sigma))
        return sum(float(loss(frozen.logits(moved), frozen.labels)) for moved in signs) / 2

    return largest_sigma(pair_mean, float(loss(frozen.logits(), frozen.labels)), rise=0.1, sigma_max=5.0, draws=pairs)


def input_noise_tolerance(
    model: nn.Module, images: Tensor, labels: Tensor, *, pairs: int = 4, seed: int = 0, loss: Loss = F.cross_entropy
) -> NoiseTolerance:
    """Find the largest σ, up to 2, with E[loss(clamp(x + σ ε, 0, 1))] ≤ 1.1 loss(x) (higher is flatter).

    σ is in [0, 1] pixels, before the normalisation inside the network. Arguments and errors are those of
    `weight_noise_tolerance`.
    """
    frozen, noise = Frozen(model, images, labels), [normal_like(images, seed, pair) for pair in range(pairs)]

    def pair_mean(sigma: float, pair: int) -> float:
        signs = ((images + s * noise[pair]).clamp(0, 1) for s in (sigma, -sigma))
        return sum(float(loss(frozen.logits(images=moved), frozen.labels)) for moved in signs) / 2

    return largest_sigma(pair_mean, float(loss(frozen.logits(), frozen.labels)), rise=0.1, sigma_max=2.0, draws=pairs)


def largest_sigma(
    loss_of_draw: Callable[[float, int], float], clean: float, rise: float, sigma_max: float, draws: int
) -> NoiseTolerance:
    """Find where the mean over draws of ``loss_of_draw(sigma, draw)`` first meets (1 + rise) clean, with an interval.

    σ is doubled from a 128th of ``sigma_max`` (halved first, where that is too much already) until the bound is passed;
    of several crossings within a factor 2 it is one. Brent's method closes in to a thousandth, in σ², in which the loss
    is nearly straight. The interval is σ ± t s / (√draws · slope) from the spread s of the draws' losses at σ.

    ``clean`` is the loss without noise; ``draw`` counts the independent draws. Errors as in `weight_noise_tolerance`.
    """
    from scipy.optimize import brentq
    from scipy.stats import t as student

    if not (math.isfinite(clean) and clean > 0):
        raise UserError(f"A relative rise needs a finite loss above 0 without noise, got {clean}.")
    if draws < 2 or rise <= 0 or sigma_max <= 0:
        raise UserError("An interval needs at least two draws; rise and sigma_max must be above 0.")
    tried: dict[float, Tensor] = {0.0: torch.full((draws,), clean)}

    def excess(sigma: float) -> float:
        if sigma not in tried:
            found = torch.tensor([loss_of_draw(sigma, draw) for draw in range(draws)])
            tried[sigma] = found.double().nan_to_num(nan=math.inf)
        return min(float(tried[sigma].mean()) - (1 + rise) * clean, 1e6 * clean)

    low = sigma_max / 128
    while excess(low) > 0:
        low /= 2
        if low < 1e-12 * sigma_max:
            raise UserError("The loss rises beyond its bound under the smallest noise: is it discontinuous there?")
    while excess(high := min(2 * low, sigma_max)) <= 0:
        if high == sigma_max:
            return NoiseTolerance(sigma_max, sigma_max, math.inf, clean)
        low = high
    sigma = math.sqrt(brentq(lambda s: excess(math.sqrt(s)), low**2, high**2, xtol=2e-3 * low**2, rtol=2e-3))
    slope = (excess(1.05 * sigma) - excess(sigma)) / (0.05 * sigma)
    spread = student.ppf(0.975, draws - 1) * float(tried[sigma].std()) / math.sqrt(draws)
    half = float(spread / slope) if slope > 0 else math.inf
    return NoiseTolerance(sigma, max(0.0, sigma - half), sigma + half, clean)
