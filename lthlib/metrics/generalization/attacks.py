"""Attacks: images changed by at most epsilon a pixel so that the network errs.

They work on [0, 1] pixels, on a copy of the network in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lthlib.core.errors import UserError
from lthlib.metrics.arrays import check_labels
from lthlib.metrics.registry import metric
from lthlib.networks.checks import copied
from lthlib.networks.predict import scaled_to

EPSILONS = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
CHUNK = 100  # images of up to 64 pixels; a ResNet-20 keeps some 3 MB of each for the backward pass

_row = partial(metric, dimension="generalization", higher_is_better=True)
_row("fgsm_accuracy", "FGSM accuracy", reference="goodfellow2015explaining", in_verdict=True)(
    r"Accuracy on $\mathrm{clip}(x + \epsilon\,\mathrm{sign}\,\nabla_x L, 0, 1)$, $\epsilon = 8/255$ of a pixel's "
    "range."
)
_row("pgd_accuracy", "PGD-20 accuracy", reference="madry2018towards")(
    r"Accuracy after 20 projected gradient steps of $\epsilon/4$ from a random start, $\epsilon = 8/255$."
)
_row("fgsm_pgd_gap", "FGSM minus PGD-20", higher_is_better=None, reference="athalye2018obfuscated")(
    r"Accuracy under FGSM minus that under PGD-20 on the same images, $\epsilon = 8/255$; large where one step "
    "flatters, below zero a sign of masked gradients."
)
_row("adversarial_margin", "Adversarial margin", unit="", reference="goodfellow2015explaining")(
    r"Mean of $p_y - \max_{j \neq y} p_j$ on FGSM images, $\epsilon = 8/255$; from -1 to 1."
)
_row("adversarial_accuracy", "Accuracy under attack", reference="madry2018towards")(
    r"Accuracy on images changed by at most $\epsilon$ (severity: $255\,\epsilon$) by FGSM or PGD-20."
)


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Fast gradient sign method: clamp(x + epsilon sign(dL/dx), 0, 1) (Goodfellow et al., 2015).

    `pgd` with one step of epsilon and no random start. L is the cross-entropy with the true label. sign(0) = 0, so a
    pixel without influence stays.
    """
    return pgd(model, images, labels, epsilon, steps=1, step_size=epsilon, seed=None)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    steps: int = 20,
    step_size: float | None = None,
    seed: int | None = 0,
) -> Tensor:
    """Projected gradient descent in the L-infinity ball (Madry et al., 2018); the last iterate.

    From a start drawn uniformly in the ball: x <- clamp(project(x + step_size sign(dL/dx)), 0, 1). An accuracy under
    PGD far below that under FGSM shows that one step flatters; one above it is a sign of masked gradients (Athalye et
    al., 2018).

    The model takes [0, 1] pixels and normalises them inside. Images are (N, C, H, W), floats in [0, 1] or uint8; those
    returned are in [0, 1], on the same device, in float64 for a network in float64, else in float32. ``epsilon`` is the
    largest change of a pixel (the paper's is 8 / 255), ``step_size`` by default epsilon / 4 (2 / 255, as Madry et al.
    on CIFAR-10). Without ``seed`` the start is the image itself.
    """
    _check_epsilons([epsilon])
    step_size = epsilon / 4 if step_size is None else step_size
    if steps < 1 or step_size < 0 or (step_size == 0 and epsilon > 0):
        raise UserError(f"PGD needs steps >= 1 and step_size > 0; got steps={steps}, step_size={step_size}.")
    start, parts = torch.zeros(images.shape), []
    if seed is not None:  # drawn for all images at once so that chunks change nothing
        start = epsilon * (2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) - 1)
    for still, x, y, first in _batches(model, images, labels, start):
        adversarial = (x + first.to(x)).clamp(0, 1)
        for _ in range(steps):
            moved = adversarial + step_size * _sign(still, adversarial, y)
            adversarial = torch.clamp(moved, x - epsilon, x + epsilon).clamp(0, 1)
        parts.append(adversarial.to(images.device))
    return torch.cat(parts)


def adversarial_logits(
    model: nn.Module, images: Tensor, labels: Tensor, epsilons: Sequence[float] = EPSILONS
) -> np.ndarray:
    """Logits of FGSM images for each epsilon, (E, N, C), for every metric to read; at epsilon 0 the clean ones.

    One backward pass serves all epsilons, since the gradient at the image does not depend on them. Arguments and errors
    are those of `pgd`; float64 for a network in float64, else float32.
    """
    _check_epsilons(epsilons)
    parts = []
    for still, x, y in _batches(model, images, labels):
        sign = _sign(still, x, y)
        with torch.no_grad():
            logits = [still((x + e * sign).clamp(0, 1).to(_weight(still).dtype)) for e in epsilons]
        parts.append(torch.stack(logits).to("cpu", x.dtype))
    return torch.cat(parts, dim=1).numpy()


def _check_epsilons(epsilons: Sequence[float]) -> None:
    for epsilon in epsilons:
        if not 0 <= epsilon <= 1:
            raise UserError(f"epsilon is {epsilon!r}; it is in units of [0, 1] pixels: write 8 / 255, not 8.")


def _batches(model: nn.Module, images: Tensor, labels: Tensor, *more: Tensor) -> Iterator[tuple]:
    """A still copy of the model with chunks of images in [0, 1], their labels and what else belongs to the images.

    On the model's device, the images in its precision but at least float32: a pixel in half precision would be rounded
    by as much as an attack moves it.
    """
    if images.ndim != 4 or len(images) == 0:
        raise UserError(f"The images have the shape {tuple(images.shape)}; (N >= 1, C, H, W) is needed.")
    labels, like = torch.as_tensor(labels), _weight(model)
    if labels.shape != images.shape[:1]:
        raise UserError(f"The labels have the shape {tuple(labels.shape)}; one per image is needed.")
    with torch.inference_mode(False):  # what is made in that mode can never be differentiated
        still = copied(model).eval().requires_grad_(False)
    chunk = scaled_to(images.shape[2:], CHUNK)
    for x, y, *rest in zip(*(given.split(chunk) for given in (images, labels, *more)), strict=True):
        scale, floating = (255, True) if x.dtype == torch.uint8 else (1, x.is_floating_point())
        x = x.to(like.device, torch.promote_types(like.dtype, torch.float32)) / scale
        if not floating or not bool(((x >= 0) & (x <= 1)).all()):
            raise UserError(
                "The images hold values outside [0, 1]. Attacks work on pixels; normalisation belongs inside "
                "the network."
            )
        yield still, x, y.to(like.device), *rest


def _weight(model: nn.Module) -> Tensor:
    """A parameter, for its device and number type."""
    return next(model.parameters(), torch.empty(0))


def _sign(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Sign of the gradient of the summed loss by the pixels.

    The loss is taken in float64: in float32 the pull on a true class of probability 1 - 1e-8 rounds away and the sign
    is that of something else.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        logits = model(x.to(_weight(model).dtype)).double()
        check_labels(y, len(x), logits.shape[1])
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y.long(), reduction="sum"), x)
    return gradient.sign()
