"""What a network must be before a number of it is believed: one finite row of logits an image, the same every time."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor, nn

from lthlib.core.errors import UserError
from lthlib.core.store import say

Answered = list[tuple[Tensor, Tensor]]
"""Batches of images and a network's logits for them."""


def copied(model: nn.Module) -> nn.Module:
    """Return a copy, also where a network holds results of a computation, as `torch.nn.utils.prune` leaves them."""
    held = (v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf)
    try:
        return copy.deepcopy(model, {id(value): value.detach().clone() for value in held})
    except Exception as error:  # a foreign network may hold anything: files, locks, graphs
        raise UserError(f"The network {type(model).__name__} cannot be copied ({first_line(error)}).") from error


def check_shape(logits: object, n: int) -> None:
    """Raise `UserError` unless a network's output for n images is one row of logits an image."""
    if not isinstance(logits, Tensor):
        raise UserError(
            f"The network returns a {type(logits).__name__}; it must return one tensor of logits (images, classes): "
            "wrap it in a network that picks them out."
        )
    if logits.ndim != 2 or len(logits) != n:
        raise UserError(
            f"The network returns the shape {tuple(logits.shape)} for {n} images; it must return one row of logits "
            "an image."
        )


def check_rows(logits: object, n: int) -> Tensor:
    """Return a network's output for n images in float32; `UserError` unless it is one finite row of logits an image."""
    check_shape(logits, n)
    if not logits.isfinite().all():
        raise UserError(
            "The network returns logits that are not finite (NaN or infinity): no number can be made of it."
        )
    return logits.float()


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Return a network's logits (N, classes) for float images (N, C, H, W); `UserError` where it fails on them."""
    try:
        logits = model(images)
    except Exception as error:  # a foreign forward() may raise anything
        raise UserError(
            f"The network cannot take images of {tuple(images.shape[1:])} (channels, height, width): "
            f"{first_line(error)}"
        ) from error
    return check_rows(logits, len(images))


def check_deterministic(model: nn.Module, images: Tensor) -> Answered:
    """Refuse a network whose answer for an image depends on chance, on its neighbours or on what was asked before.

    Of the images, [0, 1] floats (N, C, H, W), four are asked about, among noise and alone, in the mode that the network
    is in. `UserError` for dropout left active, batch normalisation without running statistics, noise, a memory.

    Returns:
        Two batches and the answers to them.
    """
    first, second = _batches(images)
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices):
        state = torch.random.get_rng_state()
        found = [(batch, answers(model, batch)) for batch in (first, second)]
        again = answers(model, first)
        alone = torch.cat([answers(model, image) for batch, _ in found for image in batch.split(1)])
        drawn = not torch.equal(state, torch.random.get_rng_state())
    if drawn or not near(again, found[0][1], 1e-5):
        raise UserError(
            "The network does not answer the same when asked the same again: it draws random numbers (dropout left "
            "active?) or remembers earlier images; make it stop that in evaluation mode."
        )
    if not near(alone, torch.cat([logits for _, logits in found]), 2e-3):
        raise UserError(
            "The network's answer for an image depends on the other images of its batch (batch normalisation without "
            "running statistics, or in training mode?): no number of it would hold for other batches."
        )
    return found


def check_own_weights(network: nn.Module, found: Answered) -> None:
    """Refuse a copy that gives these answers, whatever its weights are: it computes with those of another network."""
    blank = copied(network)
    for parameter in blank.parameters():
        parameter.data.zero_()
    if agree(blank, found, 1e-4) and any(logits.any() for _, logits in found):
        raise UserError(
            "The network does not compute with its own weights (a replaced forward that holds another network?): "
            "write it as a class, or bind the function with types.MethodType."
        )


def near(logits: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether logits agree up to a fraction of the largest expected one (float32 sums in other orders: 1e-6)."""
    same = logits.shape == expected.shape
    return same and bool((logits - expected).abs().max() <= tolerance * expected.abs().max() + 1e-6)


def agree(model: nn.Module, found: Answered, tolerance: float) -> bool:
    """Whether a network gives these answers, too; not where it fails."""
    try:
        return all(near(answers(model, batch), logits, tolerance) for batch, logits in found)
    except UserError:
        return False


def _batches(images: Tensor) -> list[Tensor]:
    """Return two batches of unlike sizes, laid out in memory as the images are: these among fixed noise."""
    noise = torch.rand(7, *images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
    noise *= torch.linspace(0.1, 1, 7).to(images).view(-1, *[1] * (images.ndim - 1))  # of several brightnesses
    parts = ([images[:4], noise[:4]], [noise[4:], images[:2]])
    by_pixel = images.ndim == 4 and images.stride(1) == 1
    layout = torch.channels_last if by_pixel else torch.contiguous_format
    return [torch.cat(part).contiguous(memory_format=layout) for part in parts]


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_logits(logits: np.ndarray, name: str) -> None:
    """Refuse a network whose outputs (N, C) are probabilities."""
    if logits.min() >= 0 and logits.max() <= 1:
        raise UserError(
            f"{name}: The network returns probabilities (all numbers lie between 0 and 1), and logits are needed: "
            "leave out the softmax or sigmoid at its end."
        )


def check_classifier(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
    """Refuse a dense network with which nothing can be compared, by its logits (N, C) for all test images.

    That is one with outputs that are probabilities, classes in another order than their names, or accuracy no better
    than guessing (the most frequent class, and three standard errors).
    """
    order = f"here they are, in order: {', '.join(classes[:12])}{' ...' if len(classes) > 12 else ''}"
    check_logits(logits, "dense")
    if np.abs(logsumexp(logits, axis=1)).max() < 1e-3:
        say("note: the network returns log-probabilities, not logits; scores of the logits' size (energy) are constant")
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (labels, logits.argmax(1)), 1)
    of = counts.sum(1)
    most = counts.max(1) > of / 2 + 1.5 * np.sqrt(of)  # three standard errors above half: not of fewer than ten images
    taken = np.where(most, counts.argmax(1), np.arange(len(classes)))
    one_to_one = len({*taken[most]}) == most.sum()  # else it has learned little, as where most answers are one class
    for label, answer in enumerate(taken):
        if one_to_one and answer != label and taken[answer] != answer:
            raise UserError(
                f"The dense network takes most images of {classes[label]} for {classes[answer]}, and most of "
                f"{classes[answer]} for {classes[taken[answer]]}: its classes seem to be in another order ({order})."
            )
    right, n, share = int(counts.trace()), len(labels), of.max() / len(labels)
    if right <= n * share + 3 * (n * share * (1 - share)) ** 0.5:
        raise UserError(
            f"The dense network is right about {100 * right / n:.1f} % of the {n:,} test images, no better than "
            f"guessing ({100 * share:.1f} %): nothing can be compared with it. Look at the order of the classes "
            f"({order}), at the normalisation (images come as [0, 1] pixels), and whether these are its weights."
        )
