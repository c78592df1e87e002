"""Generalization: what holds on the test set, on foreign images, under corruption and under attack.

Accuracy, out-of-distribution detection and corruption errors are pure functions of logits (N, C), scores (N,)
or error rates. The attacks need the network; they work on [0, 1] pixels, in evaluation mode, and leave the
network and every random state as found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from lthlib.core.errors import Registry, UserError, choose
from lthlib.data import corruptions, ood_classes, source
from lthlib.data.corrupted import corrupted_parts, corruption_names, corruption_source, sample
from lthlib.metrics import Value, describe
from lthlib.metrics.arrays import as_array, check_labels, check_logits, softmax
from lthlib.networks.predict import scaled_to
from lthlib.tickets.subject import Subject

# ------------------------------------------------------------------------------------------------ accuracy


def accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Fraction of images whose largest logit is the true class; of equal logits the first class wins.

    Higher is better.

    Args:
        logits: Network outputs, (N, C).
        labels: True classes, (N,).

    Raises:
        UserError: For NaN or infinite logits, labels out of range, or an empty set.
    """
    logits = check_logits(logits)
    return float(np.mean(logits.argmax(axis=1) == check_labels(labels, *logits.shape)))


def true_class_margin(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Probability of the true class minus the largest other probability, (N,), in [-1, 1].

    Positive where the network is right. In probabilities, so that networks of different logit scale compare. The
    arguments and errors are those of `accuracy`.
    """
    probs = softmax(logits)
    rows, labels = np.arange(len(probs)), check_labels(labels, *probs.shape)
    true = probs[rows, labels]
    probs[rows, labels] = -np.inf
    return true - probs.max(axis=1)


def keep_classes(logits: ArrayLike, classes: ArrayLike) -> np.ndarray:
    """Logits of some classes alone, (N, C) -> (N, K), to be scored by a softmax over these.

    ImageNet-O is scored this way: its images are of none of ImageNet's classes, and were chosen for being
    mistaken for one of 200; the other 800 are left out *before* the softmax, for the in-distribution images too
    (Hendrycks et al., 2021).

    Args:
        logits: Network outputs, (N, C).
        classes: Indices of the kept classes, (K,), K >= 2 and all different; see `class_indices`.

    Raises:
        UserError: For bad logits, or indices that repeat or are out of range.
    """
    logits, classes = check_logits(logits), as_array(classes, "kept classes")
    n_classes = logits.shape[1]
    whole = classes.ndim == 1 and classes.dtype.kind in "iu"
    if not whole or len(classes) < 2 or len(np.unique(classes)) < len(classes):
        raise UserError("The kept classes must be a list of at least two different class indices.")
    check_labels(classes, len(classes), n_classes)
    return logits[:, classes]


def class_indices(kept: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Positions of some class names among all, for `keep_classes`.

    Args:
        kept: Names to keep, for instance the folder names of ImageNet-O.
        names: All class names in the order of the logits, for instance the folder names of ImageNet, sorted.

    Raises:
        UserError: For a name that is not among all.
    """
    positions = {name: i for i, name in enumerate(names)}
    for name in kept:
        choose(name, positions, "class")
    return np.array([positions[name] for name in kept], dtype=np.intp)


# ------------------------------------------------------------------------------ out of distribution: scores


def msp_score(logits: ArrayLike) -> np.ndarray:
    """1 - max softmax probability, (N, C) -> (N,); higher = more OoD (Hendrycks and Gimpel, 2017).

    Summed over the classes that are not the largest, in float64, so that confidences which all round to 1 in
    a float32 softmax keep their order instead of tying. The order is that of minus the maximum probability.

    Raises:
        UserError: For NaN or infinite logits, or an empty set.
    """
    z = check_logits(logits).astype(np.float64)
    rows, top = np.arange(len(z)), z.argmax(axis=1)
    np.exp(z - z[rows, top][:, None], out=z)
    z[rows, top] = 0
    rest = z.sum(axis=1)
    return rest / (1 + rest)


def max_logit_score(logits: ArrayLike) -> np.ndarray:
    """Minus the largest logit in float64, (N, C) -> (N,); higher = more OoD (Hendrycks et al., 2022).

    Raises:
        UserError: For NaN or infinite logits, or an empty set.
    """
    return -check_logits(logits).max(axis=1).astype(np.float64)


def energy_score(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """Energy -T log sum_c exp(z_c / T) in float64, (N, C) -> (N,); higher = more OoD (Liu et al., 2020).

    Args:
        logits: Network outputs, (N, C).
        temperature: T > 0; the paper finds 1 best.

    Raises:
        UserError: For NaN or infinite logits, an empty set, or T <= 0.
    """
    if not temperature > 0:
        raise UserError(f"temperature is {temperature!r}; a positive number is needed.")
    z = check_logits(logits).astype(np.float64) / temperature
    top = z.max(axis=1)
    return -temperature * (top + np.log(np.exp(z - top[:, None]).sum(axis=1)))


OOD_SCORES = Registry("OoD score")
OOD_SCORES["msp"] = msp_score
OOD_SCORES["max_logit"] = max_logit_score
OOD_SCORES["energy"] = energy_score


# ------------------------------------------------------------------------------ out of distribution: curves


class DetectionCurve(NamedTuple):
    """Counts at every distinct threshold, from none flagged to all: (K + 1,) each, starting at 0.

    Attributes:
        false: Negatives at or above the threshold.
        true: Positives at or above the threshold.
    """

    false: np.ndarray
    true: np.ndarray


def detection_curve(in_scores: ArrayLike, out_scores: ArrayLike, positive: str = "ood") -> DetectionCurve:
    """Count what each threshold flags; equal scores are flagged together. One sort, O(n log n).

    Args:
        in_scores: Scores of in-distribution images, (N,), higher = more OoD.
        out_scores: Scores of OoD images, (M,).
        positive: ``"ood"``: OoD images are to be flagged, by high scores; ``"id"``: in-distribution images
            are to be accepted, by low scores.

    Raises:
        UserError: For scores that are NaN, infinite, or empty, or an unknown ``positive``.
    """
    choose(positive, ("ood", "id"), "positive class")
    sides = [_scores(in_scores, "in-distribution scores"), _scores(out_scores, "OoD scores")]
    negative, wanted = sides if positive == "ood" else (-sides[1], -sides[0])
    scores = np.concatenate([negative, wanted])
    order = np.argsort(scores)[::-1]
    ordered, is_wanted = scores[order], order >= len(negative)
    last_of_ties = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    true = np.cumsum(is_wanted)[last_of_ties]
    return DetectionCurve(np.append(0, last_of_ties + 1 - true), np.append(0, true))


def _scores(scores: ArrayLike, name: str) -> np.ndarray:
    array = as_array(scores, name)
    if array.ndim != 1 or len(array) == 0:
        raise UserError(f"The {name} have the shape {array.shape}; one per image and at least one is needed.")
    return array.astype(np.float64)


def auroc(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Area under the ROC curve: P(OoD score > in score) + P(equal) / 2. Higher is better, 0.5 is chance.

    The same whichever class is called positive. Counted in whole numbers, hence exact.

    Args:
        in_scores: Scores of in-distribution images, (N,), higher = more OoD.
        out_scores: Scores of OoD images, (M,).

    Raises:
        UserError: For scores that are NaN, infinite, or empty.
    """
    false, true = detection_curve(in_scores, out_scores)
    twice_area = (np.diff(false) * (true[1:] + true[:-1])).sum()
    return float(twice_area / (2 * int(false[-1]) * int(true[-1])))


def aupr(in_scores: ArrayLike, out_scores: ArrayLike, positive: str = "ood") -> float:
    """Area under the precision-recall curve as average precision, sum_k (R_k - R_{k-1}) P_k. Higher is
    better.

    The step-wise sum (as scikit-learn's ``average_precision_score``), since interpolating linearly between
    points is too optimistic (Davis and Goadrich, 2006). Unlike AUROC it depends on which class is positive
    and on the share of OoD images: chance is that share.

    Args:
        in_scores: Scores of in-distribution images, (N,), higher = more OoD.
        out_scores: Scores of OoD images, (M,).
        positive: ``"ood"`` (AUPR-out) or ``"id"`` (AUPR-in).

    Raises:
        UserError: For scores that are NaN, infinite, or empty, or an unknown ``positive``.
    """
    false, true = detection_curve(in_scores, out_scores, positive)
    precision = true[1:] / (false[1:] + true[1:])
    return float((np.diff(true) * precision).sum() / true[-1])


def fpr_at_tpr(in_scores: ArrayLike, out_scores: ArrayLike, tpr: float = 0.95, positive: str = "id") -> float:
    """False positive rate at the first threshold that reaches a true positive rate. Lower is better.

    Two conventions go by the name FPR95 and give different numbers:

    * ``positive="id"`` (Liang et al., 2018, and most of the literature; the default): the share of *OoD*
      images accepted as known when 95 % of the in-distribution images are accepted.
    * ``positive="ood"`` (Hendrycks et al., 2019, pytorch-ood): the share of *in-distribution* images flagged
      when 95 % of the OoD images are flagged.

    Args:
        in_scores: Scores of in-distribution images, (N,), higher = more OoD.
        out_scores: Scores of OoD images, (M,).
        tpr: True positive rate to reach, in (0, 1].
        positive: ``"id"`` or ``"ood"``.

    Raises:
        UserError: For scores that are NaN, infinite, or empty, a rate outside (0, 1], or an unknown
            ``positive``.
    """
    if not 0 < tpr <= 1:
        raise UserError(f"tpr is {tpr!r}; a rate in (0, 1] is needed.")
    false, true = detection_curve(in_scores, out_scores, positive)
    first = np.argmax(true / true[-1] >= tpr)
    return float(false[first] / false[-1])


def ood_summary(in_logits: ArrayLike, out_logits: ArrayLike, score: str = "msp") -> dict[str, float]:
    """Every detection number of one score.

    Args:
        in_logits: Network outputs on in-distribution images, (N, C).
        out_logits: Network outputs on OoD images, (M, C).
        score: A name in `OOD_SCORES`.

    Returns:
        ``auroc``, ``aupr`` and ``aupr_id`` (OoD or ID positive), ``fpr95`` and ``fpr95_ood_positive`` (the
        two conventions of `fpr_at_tpr`).

    Raises:
        UserError: For bad logits or an unknown score.
    """
    known, foreign = (OOD_SCORES[score](logits) for logits in (in_logits, out_logits))
    return {
        "auroc": auroc(known, foreign),
        "aupr": aupr(known, foreign, "ood"),
        "aupr_id": aupr(known, foreign, "id"),
        "fpr95": fpr_at_tpr(known, foreign, positive="id"),
        "fpr95_ood_positive": fpr_at_tpr(known, foreign, positive="ood"),
    }


# ---------------------------------------------------------------------------------------- corruption error

# Error of AlexNet on ImageNet-C, mean over the five severities: Hendrycks and Dietterich (2019), the
# six-digit values as published with AugMix (github.com/google-research/augmix, imagenet.py).
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
# Top-1 error of the same network on the clean images: torchvision's AlexNet, whose accuracy is 56.522 %.
ALEXNET_CLEAN_ERROR = 0.43478
COMMON_CORRUPTIONS = corruptions.common()
ALL_CORRUPTIONS = tuple(corruptions.CORRUPTIONS)
EXTRA_CORRUPTIONS = tuple(name for name in ALL_CORRUPTIONS if name not in COMMON_CORRUPTIONS)

Errors = Mapping[str, Sequence[float]]


def corruption_error(errors: Errors, corruptions: Sequence[str] = COMMON_CORRUPTIONS) -> float:
    """Mean error over corruptions and severities, unnormalised. Lower is better.

    What is called mCE on CIFAR-10-C (as in AugMix): no division by AlexNet, clean images not counted.

    Args:
        errors: Corruption -> error rate at each severity; all with the same number of severities.
        corruptions: The corruptions that count: `COMMON_CORRUPTIONS` (15) or `ALL_CORRUPTIONS` (19).

    Returns:
        The mean in [0, 1].

    Raises:
        UserError: For a missing corruption, uneven severities, or an error outside [0, 1].
    """
    return float(_mean_errors(errors, corruptions).mean())


def corruption_error_alexnet(errors: Errors, corruptions: Sequence[str] = COMMON_CORRUPTIONS) -> float:
    """Mean over corruptions of the error relative to AlexNet's, the mCE of ImageNet-C. Lower is better.

    mean_c (sum_s E_sc / sum_s E_sc of AlexNet), Hendrycks and Dietterich (2019); 1 is as bad as AlexNet, and
    it may exceed 1. The constants are AlexNet's on ImageNet-C: on other data the number is no comparison with
    it.

    Args:
        errors: Corruption -> error rate at the severities 1 to 5.
        corruptions: Those that count; AlexNet's error is published for the 15 `COMMON_CORRUPTIONS` alone.

    Raises:
        UserError: As `corruption_error`, for other than five severities, or a corruption without a constant.
    """
    means, alexnet = _beside_alexnet(errors, corruptions)
    return float((means / alexnet).mean())


def _beside_alexnet(errors: Errors, corruptions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean errors by corruption, ours and AlexNet's."""
    for name in corruptions:
        choose(name, ALEXNET_ERROR, "corruption with a published AlexNet error")
    means = _mean_errors(errors, corruptions)
    n_severities = len(errors[corruptions[0]])
    if n_severities != 5:
        raise UserError(f"AlexNet's errors are means over five severities; {n_severities} are given.")
    return means, np.array([ALEXNET_ERROR[name] for name in corruptions])


def relative_corruption_error(
    errors: Errors, clean_error: float, corruptions: Sequence[str] = COMMON_CORRUPTIONS
) -> float:
    """Mean error over corruptions and severities minus the clean error: what corruption adds. Lower is
    better.

    It rewards a network that is bad on clean images too, so read it beside the clean error. The "relative mCE" of
    Hendrycks and Dietterich divides this difference by AlexNet's: `relative_corruption_error_alexnet`.

    Args:
        errors: Corruption -> error rate at each severity; all with the same number of severities.
        clean_error: Error rate on the same images before corruption.
        corruptions: The corruptions that count.

    Returns:
        The difference in [-1, 1].

    Raises:
        UserError: As `corruption_error`, and for a clean error outside [0, 1].
    """
    return corruption_error(errors, corruptions) - _checked_error(clean_error)


def relative_corruption_error_alexnet(
    errors: Errors, clean_error: float, corruptions: Sequence[str] = COMMON_CORRUPTIONS
) -> float:
    """Mean over corruptions of what corruption adds, relative to what it adds to AlexNet's error. Lower is better.

    mean_c (sum_s (E_sc - E_clean) / sum_s (E_sc - E_clean of AlexNet)), the relative mCE of Hendrycks and Dietterich
    (2019), for ImageNet-C as `corruption_error_alexnet`. It may be negative.

    Args:
        errors: Corruption -> error rate at the severities 1 to 5.
        clean_error: Error rate on the same images before corruption.
        corruptions: As `corruption_error_alexnet`.

    Raises:
        UserError: As `corruption_error_alexnet`, and for a clean error outside [0, 1].
    """
    means, alexnet = _beside_alexnet(errors, corruptions)
    return float(((means - _checked_error(clean_error)) / (alexnet - ALEXNET_CLEAN_ERROR)).mean())


def _checked_error(clean_error: float) -> float:
    if not 0 <= clean_error <= 1:
        raise UserError(f"The clean error is {clean_error!r}; a fraction in [0, 1] is needed.")
    return float(clean_error)


def _mean_errors(errors: Errors, corruptions: Sequence[str]) -> np.ndarray:
    """Mean over severities of each corruption, (K,), checked."""
    if len(corruptions) == 0 or len(set(corruptions)) < len(corruptions):
        raise UserError("Name at least one corruption, and each only once.")
    missing = [name for name in corruptions if name not in errors]
    if missing:
        raise UserError(f"No error rates for {', '.join(missing)}; all {len(corruptions)} corruptions are needed.")
    rows = {name: as_array(errors[name], f"errors under {name}") for name in corruptions}
    shapes = {row.shape for row in rows.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1 or shapes == {(0,)}:
        raise UserError(f"Each corruption needs one error rate per severity, the same number for all; got {shapes}.")
    table = np.array(list(rows.values()), dtype=np.float64)
    if table.min() < 0 or table.max() > 1:
        raise UserError(f"Error rates run from {table.min():.4g} to {table.max():.4g}; give fractions in [0, 1].")
    return table.mean(axis=1)


# ------------------------------------------------------------------------------------------------- attacks

EPSILONS = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
CHUNK = 100  # images of up to 64 pixels; a ResNet-20 keeps some 3 MB of each for the backward pass


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, chunk: int = CHUNK) -> Tensor:
    """Fast gradient sign method: clamp(x + epsilon sign(dL/dx), 0, 1) (Goodfellow et al., 2015).

    L is the cross-entropy with the true label. Its last step is taken in float64: in float32 the pull on a
    true class of probability 1 - 1e-8 rounds away and the sign is that of something else. sign(0) = 0, so a
    pixel without influence stays.

    Args:
        model: Takes [0, 1] pixels; normalisation inside. Its state and every random state stay as found.
        images: (N, C, H, W), floats in [0, 1] or uint8.
        labels: True classes, (N,).
        epsilon: Largest change of a pixel, in [0, 1]; the paper uses 8 / 255.
        chunk: Images per pass (fewer where they exceed 64 pixels); bounds the memory, changes nothing else.

    Returns:
        Float images in [0, 1], on the device of ``images``.

    Raises:
        UserError: For images outside [0, 1], labels out of range, an empty set, or a bad epsilon or chunk.
    """
    _check_epsilon(epsilon)
    with _evaluating(model):
        parts = [
            _step(x, _sign(model, x, y), epsilon).to(images.device) for x, y in _batches(model, images, labels, chunk)
        ]
    return torch.cat(parts)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    steps: int = 20,
    step_size: float | None = None,
    seed: int | None = 0,
    chunk: int = CHUNK,
) -> Tensor:
    """Projected gradient descent in the L-infinity ball (Madry et al., 2018); the last iterate.

    From a start drawn uniformly in the ball: x <- clamp(project(x + step_size sign(dL/dx)), 0, 1). An
    accuracy under PGD far below that under FGSM, at the same epsilon, shows that one step flatters; one above
    it is a sign of masked gradients (Athalye et al., 2018).

    Args:
        model: Takes [0, 1] pixels; normalisation inside. Its state and every random state stay as found.
        images: (N, C, H, W), floats in [0, 1] or uint8.
        labels: True classes, (N,).
        epsilon: Largest change of a pixel, in [0, 1].
        steps: Number of steps, at least 1.
        step_size: Length of a step; epsilon / 4 by default (2 / 255 for 8 / 255, as Madry et al. on
            CIFAR-10).
        seed: Seed of the random start; None starts at the image itself.
        chunk: Images per pass (fewer where they exceed 64 pixels); bounds the memory, changes nothing else.

    Returns:
        Float images in [0, 1], on the device of ``images``.

    Raises:
        UserError: As `fgsm`, and for steps < 1 or a step size that is not positive.
    """
    _check_epsilon(epsilon)
    step_size = epsilon / 4 if step_size is None else step_size
    if steps < 1 or step_size < 0 or (step_size == 0 and epsilon > 0):
        raise UserError(f"PGD needs steps >= 1 and step_size > 0; got steps={steps}, step_size={step_size}.")
    start = torch.zeros(images.shape) if seed is None else _uniform(images.shape, epsilon, seed)
    parts = []
    with _evaluating(model):
        done = 0
        for x, y in _batches(model, images, labels, chunk):
            adversarial = (x + start[done : done + len(x)].to(x)).clamp(0, 1)
            done += len(x)
            for _ in range(steps):
                moved = adversarial + step_size * _sign(model, adversarial, y)
                adversarial = torch.clamp(moved, x - epsilon, x + epsilon).clamp(0, 1)
            parts.append(adversarial.to(images.device))
    return torch.cat(parts)


def adversarial_logits(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilons: Sequence[float] = EPSILONS,
    attack: str = "fgsm",
    chunk: int = CHUNK,
    **pgd_options: object,
) -> np.ndarray:
    """Logits of the attacked images for each epsilon, (E, N, C) in float32, for every metric to read.

    For FGSM one backward pass serves all epsilons, since the gradient at the image does not depend on them.

    Args:
        model: Takes [0, 1] pixels; normalisation inside. Its state and every random state stay as found.
        images: (N, C, H, W), floats in [0, 1] or uint8.
        labels: True classes, (N,).
        epsilons: Largest changes of a pixel, each in [0, 1].
        attack: ``"fgsm"`` or ``"pgd"``.
        chunk: Images per pass.
        pgd_options: ``steps``, ``step_size`` and ``seed`` of `pgd`.

    Raises:
        UserError: As `fgsm` and `pgd`, for no epsilon, an unknown attack, or options given to FGSM.
    """
    choose(attack, ("fgsm", "pgd"), "attack")
    if len(epsilons) == 0 or (attack == "fgsm" and pgd_options):
        raise UserError(f"Give at least one epsilon, and {sorted(pgd_options) or 'steps'} only to attack='pgd'.")
    for epsilon in epsilons:
        _check_epsilon(epsilon)
    parts = []
    if attack == "fgsm":
        with _evaluating(model):
            for x, y in _batches(model, images, labels, chunk):
                sign = _sign(model, x, y)
                parts.append(torch.stack([_logits(model, _step(x, sign, epsilon)) for epsilon in epsilons]))
        return torch.cat(parts, dim=1).numpy()
    for epsilon in epsilons:
        attacked = pgd(model, images, labels, epsilon, chunk=chunk, **pgd_options)
        with _evaluating(model):
            batches = _batches(model, attacked, labels, chunk)
            parts.append(torch.cat([_logits(model, x) for x, _ in batches]))
    return torch.stack(parts).numpy()


class AdversarialCurve(NamedTuple):
    """Accuracy under attack over epsilon, (E,) each.

    Attributes:
        epsilons: Largest change of a pixel.
        accuracy: Fraction still right.
        margin: Mean `true_class_margin`.
    """

    epsilons: np.ndarray
    accuracy: np.ndarray
    margin: np.ndarray


def adversarial_accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilons: Sequence[float] = EPSILONS,
    attack: str = "fgsm",
    chunk: int = CHUNK,
    **pgd_options: object,
) -> AdversarialCurve:
    """Accuracy and mean true-class margin under attack, over epsilon. Higher is better.

    The arguments and errors are those of `adversarial_logits`. At epsilon 0 it is the clean accuracy.
    """
    logits = adversarial_logits(model, images, labels, epsilons, attack, chunk, **pgd_options)
    return AdversarialCurve(
        np.asarray(epsilons, dtype=np.float64),
        np.array([accuracy(z, labels) for z in logits]),
        np.array([true_class_margin(z, labels).mean() for z in logits]),
    )


def _check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon <= 1:
        raise UserError(f"epsilon is {epsilon!r}; it is in units of [0, 1] pixels: write 8 / 255, not 8.")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module's own mode and the random states come back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def _batches(model: nn.Module, images: Tensor, labels: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of float images in [0, 1] with their labels, on the model's device."""
    if chunk < 1:
        raise UserError(f"chunk is {chunk}; at least one image per pass is needed.")
    if images.ndim != 4 or len(images) == 0:
        raise UserError(f"The images have the shape {tuple(images.shape)}; (N >= 1, C, H, W) is needed.")
    labels = torch.as_tensor(labels)
    if labels.shape != images.shape[:1]:
        raise UserError(f"The labels have the shape {tuple(labels.shape)}; one per image is needed.")
    device = next((p.device for p in model.parameters()), images.device)
    chunk = scaled_to(images.shape[2:], chunk)
    for x, y in zip(images.split(chunk), labels.split(chunk), strict=True):
        x = x.to(device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        if not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):
            raise UserError(
                "The images hold values outside [0, 1]. Attacks work on pixels; normalisation belongs inside "
                "the network."
            )
        yield x, y.to(device)


def _sign(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Sign of the gradient of the summed loss by the pixels."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        logits = model(x).double()
        check_labels(y, len(x), logits.shape[1])
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y.long(), reduction="sum"), x)
    return gradient.sign()


def _step(x: Tensor, direction: Tensor, epsilon: float) -> Tensor:
    return (x + epsilon * direction).clamp(0, 1)


def _uniform(shape: Sequence[int], epsilon: float, seed: int) -> Tensor:
    """Uniform in [-epsilon, epsilon], drawn for all images at once so that chunks change nothing."""
    return epsilon * (2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1)


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().cpu()


# ----------------------------------------------------------------------------------------------------- rows


def _row(name: str, title: str, definition: str, reference: str, **more: object) -> None:
    fields = {"higher_is_better": True, "unit": "fraction"} | more
    describe(name, title, dimension="generalization", definition=definition, reference=reference, **fields)


_row(
    "test_accuracy",
    "Accuracy",
    "Fraction of images whose largest logit is the true class.",
    "chen2022can",
    in_verdict=True,
)
_row(
    "ood_auroc",
    "OoD ROC-AUC",
    r"$P(s_\mathrm{OoD} > s_\mathrm{ID}) + \frac12 P(=)$ with the score $1-\max_c p_c$.",
    "hendrycks2017baseline",
    in_verdict=True,
)
_row(
    "corruption_error",
    "mCE (unnormalised, 15)",
    "Mean error over the 15 common corruptions and all severities, not divided by AlexNet's.",
    "hendrycks2019benchmarking",
    in_verdict=True,
    higher_is_better=False,
)
_row(
    "fgsm_accuracy",
    "FGSM accuracy",
    r"Accuracy on $\mathrm{clip}(x + \epsilon\,\mathrm{sign}\,\nabla_x L, 0, 1)$, $\epsilon = 8/255$ of a "
    "pixel's range.",
    "goodfellow2015explaining",
    in_verdict=True,
)
_row("ood_auroc_max_logit", "OoD ROC-AUC (max logit)", r"ROC-AUC with the score $-\max_c z_c$.", "hendrycks2022scaling")
_row("ood_auroc_energy", "OoD ROC-AUC (energy)", r"ROC-AUC with the score $-\log\sum_c e^{z_c}$.", "liu2020energy")
_row(
    "ood_aupr",
    "OoD AUPR",
    "Average precision with OoD as the positive class; chance is the share of OoD images.",
    "hendrycks2017baseline",
)
_row(
    "ood_aupr_id",
    "OoD AUPR (ID positive)",
    "Average precision with in-distribution as the positive class; chance is the share of ID images.",
    "hendrycks2017baseline",
)
_row(
    "ood_fpr95",
    "OoD FPR95",
    "Share of OoD images accepted when 95 % of the in-distribution images are accepted.",
    "liang2018enhancing",
    higher_is_better=False,
)
_row(
    "ood_fpr95_ood_positive",
    "OoD FPR95 (OoD positive)",
    "Share of in-distribution images flagged when 95 % of the OoD images are flagged.",
    "hendrycks2019deep",
    higher_is_better=False,
)
_row(
    "corrupted_accuracy",
    "Accuracy under corruption",
    "Accuracy on test images under one corruption at one severity.",
    "hendrycks2019benchmarking",
)
_row(
    "corruption_error_all",
    "mCE (unnormalised, with the extra ones)",
    "Mean error over the 15 common corruptions, the extra ones and all severities, not divided by AlexNet's.",
    "hendrycks2019benchmarking",
    higher_is_better=False,
)
_row(
    "official_corruptions",
    "Corruptions from published files",
    "Of the corruptions measured, how many were read from the published files; the others were made here.",
    "hendrycks2019benchmarking",
    higher_is_better=None,
    unit="",
)
_row(
    "relative_corruption_error",
    "Relative mCE (15)",
    "Unnormalised mean corruption error minus the clean error.",
    "hendrycks2019benchmarking",
    higher_is_better=False,
)
_row(
    "corruption_error_alexnet",
    "mCE (AlexNet-normalised, 15)",
    r"$\frac1{15}\sum_c \sum_s E_{sc} / \sum_s E^\mathrm{AlexNet}_{sc}$, with AlexNet's errors on "
    "ImageNet-C.",
    "hendrycks2019benchmarking",
    higher_is_better=False,
    unit="",
)
_row(
    "relative_corruption_error_alexnet",
    "Relative mCE (AlexNet-normalised, 15)",
    r"$\frac1{15}\sum_c \sum_s (E_{sc} - E_0) / \sum_s (E^\mathrm{AlexNet}_{sc} - E^\mathrm{AlexNet}_0)$, "
    "with AlexNet's errors on ImageNet-C and on the clean images.",
    "hendrycks2019benchmarking",
    higher_is_better=False,
    unit="",
)
_row(
    "pgd_accuracy",
    "PGD-20 accuracy",
    r"Accuracy after 20 projected gradient steps of $\epsilon/4$ from a random start, $\epsilon = 8/255$.",
    "madry2018towards",
)
_row(
    "fgsm_pgd_gap",
    "FGSM minus PGD-20",
    r"Accuracy under FGSM minus that under PGD-20 on the same images, $\epsilon = 8/255$; large where one step "
    "flatters, below zero a sign of masked gradients.",
    "athalye2018obfuscated",
    higher_is_better=None,
)
_row(
    "adversarial_margin",
    "Adversarial margin",
    r"Mean of $p_y - \max_{j \neq y} p_j$ on FGSM images, $\epsilon = 8/255$; from -1 to 1.",
    "goodfellow2015explaining",
    unit="",
)
_row(
    "adversarial_accuracy",
    "Accuracy under attack",
    r"Accuracy on images changed by at most $\epsilon$ (severity: $255\,\epsilon$) by FGSM or PGD-20.",
    "madry2018towards",
)


# ------------------------------------------------------------------------------------------------- a ticket


def measure(
    subject: Subject,
    *,
    ood: Sequence[str] = (),
    n_test: int = 10_000,
    n_ood: int = 10_000,
    n_corrupted: int = 10_000,
    extra: bool = True,
    n_attack: int = 1_000,
    n_pgd: int = 200,
    epsilons: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
) -> tuple[list[Value], dict[str, np.ndarray]]:
    """Measure how a ticket generalizes.

    Fewer images than there are is a sample spread evenly over the classes (`lthlib.data.corrupted.sample`), the
    same for every ticket.

    Args:
        subject: The ticket.
        ood: Out-of-distribution sets; empty for the data set's own list.
        n_test: Test images at most.
        n_ood: Images of each out-of-distribution set at most.
        n_corrupted: Test images at most under each corruption and severity.
        extra: Whether the corruptions beside the 15 common ones are measured too; they have a mean of their own.
        n_attack: Test images at most that are attacked by FGSM.
        n_pgd: How many of those are attacked by PGD-20 as well; it costs about twenty times as much.
        epsilons: Attack strengths in units of 1/255; the paper's 8 is always among them.

    Returns:
        Values, and for figures ``roc_<set>`` with the ROC curve on a grid of 101 false positive rates; of the dense
        network ``gallery``, a test image under every corruption at the severities 1, 3 and 5.
    """
    labels = subject.labels("test", n_test).numpy()
    known = subject.logits("test", n_test)
    values = [Value("test_accuracy", accuracy(known, labels), len(labels))]
    arrays = {}
    for name in _ood_sets(subject, ood):
        pair = known, subject.logits(f"ood:{name}", n_ood)
        classes = ood_classes(name, subject.data)
        if classes:
            pair = _among(class_indices(classes, subject.data.classes), labels, *pair)
        values += _detection(*pair, name)
        arrays[f"roc_{name}"] = _roc(*pair)
    names = corruption_names(extra)
    values += _under_corruption(subject, names, n_corrupted)
    if subject.is_dense:
        arrays["gallery"] = _gallery(subject, names, n_corrupted)
    return values + _attacks(subject, n_attack, n_pgd, sorted({*epsilons, 8.0})), arrays


def inputs(subject: Subject, *, ood: Sequence[str], extra: bool, **rest: object) -> str:
    """Return the versions of the image sets that `measure` reads beside the test images."""
    sets = [f"ood:{name}" for name in _ood_sets(subject, ood)]
    sets += [f"corrupted:{name}" for name in corruption_names(extra)]
    return " ".join(map(subject.input_version, sets))


def _ood_sets(subject: Subject, ood: Sequence[str]) -> tuple[str, ...]:
    return tuple(ood) or source(subject.ticket.data).ood


def _among(kept: np.ndarray, labels: np.ndarray, known: np.ndarray, foreign: np.ndarray) -> tuple:
    """Logits of some classes: of the test images that belong to them, and of images foreign to them."""
    mine = known[np.isin(labels, kept)]
    if len(mine) == 0:
        raise UserError("No test image has a class that the foreign images are named after; raise n_test.")
    return keep_classes(mine, kept), keep_classes(foreign, kept)


def _under_corruption(subject: Subject, names: Sequence[str], n: int) -> list[Value]:
    labels = subject.labels("test", n).numpy()
    errors: dict[str, list[float]] = {name: [] for name in names}
    for name, _, logits in subject.corrupted_logits(names, n):
        errors[name].append(1 - accuracy(logits, labels))
    n = len(labels)
    values = [
        Value("corrupted_accuracy", float(1 - error), n, name, severity)
        for name, row in errors.items()
        for severity, error in enumerate(row, start=1)
    ]
    clean = 1 - accuracy(subject.logits("test", n), labels)  # on the same images
    numbers = {
        "corruption_error": corruption_error(errors),
        "relative_corruption_error": relative_corruption_error(errors, clean),
    }
    if corruptions.default_constants(subject.data.size, subject.data.size) == "imagenet":
        numbers["corruption_error_alexnet"] = corruption_error_alexnet(errors)
        numbers["relative_corruption_error_alexnet"] = relative_corruption_error_alexnet(errors, clean)
    values += [Value(metric, value, n * 5 * len(COMMON_CORRUPTIONS), "common") for metric, value in numbers.items()]
    if len(names) > len(COMMON_CORRUPTIONS):
        values.append(Value("corruption_error_all", corruption_error(errors, names), n * 5 * len(names), "all"))
    official = sum(corruption_source(subject.data, name) == "official" for name in names)
    return [*values, Value("official_corruptions", official, len(names))]


def _gallery(subject: Subject, names: Sequence[str], n: int) -> np.ndarray:
    """One test image, small, clean in the first row, then under each corruption: uint8 (1 + names, 3, h, w, C)."""
    step = -(-subject.data.size // 64)

    def first(name: str, severity: int) -> Tensor:
        _, _, pixels = next(corrupted_parts(subject.data, name, n, subject.store, severities=(severity,)))
        return pixels[0]

    clean = subject.data.test.pixels[int(subject.sample("test", n)[0])]
    rows = [torch.stack([clean] * 3)]
    rows += [torch.stack([first(name, severity) for severity in (1, 3, 5)]) for name in names]
    return torch.stack(rows)[:, :, ::step, ::step].numpy()


def _detection(known: np.ndarray, foreign: np.ndarray, name: str) -> list[Value]:
    msp = ood_summary(known, foreign)
    numbers = {f"ood_{key}": value for key, value in msp.items()}
    for score in ("max_logit", "energy"):
        numbers[f"ood_auroc_{score}"] = ood_summary(known, foreign, score)["auroc"]
    return [Value(metric, value, len(known) + len(foreign), name) for metric, value in numbers.items()]


def _roc(known: np.ndarray, foreign: np.ndarray) -> np.ndarray:
    curve = detection_curve(msp_score(known), msp_score(foreign))
    grid = np.linspace(0, 1, 101)
    false, true = curve.false / len(known), curve.true / len(foreign)
    return np.interp(grid, false, true).astype(np.float32)


def _attacks(subject: Subject, n: int, n_pgd: int, epsilons: Sequence[float]) -> list[Value]:
    images, labels = subject.images("test", n).permute(0, 3, 1, 2), subject.labels("test", n)
    logits = adversarial_logits(subject.model, images, labels, [e / 255 for e in epsilons])
    values = [
        Value("adversarial_accuracy", accuracy(attacked, labels), len(labels), "fgsm", epsilon)
        for epsilon, attacked in zip(epsilons, logits, strict=True)
    ]
    fgsm = logits[list(epsilons).index(8.0)]
    values.append(Value("fgsm_accuracy", accuracy(fgsm, labels), len(labels), "fgsm", 8))
    margin = float(true_class_margin(fgsm, labels).mean())
    values.append(Value("adversarial_margin", margin, len(labels), "fgsm", 8))
    few = sample(labels, n_pgd)
    options = {"attack": "pgd", "steps": 20, "seed": 0}
    (pgd,) = adversarial_logits(subject.model, images[few], labels[few], [8 / 255], **options)
    after = accuracy(pgd, labels[few])
    values.append(Value("pgd_accuracy", after, len(few), "pgd", 8))
    values.append(Value("fgsm_pgd_gap", accuracy(fgsm[few.numpy()], labels[few]) - after, len(few), "pgd", 8))
    return values
