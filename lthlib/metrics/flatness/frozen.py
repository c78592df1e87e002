"""A network held still: every computation runs on a copy, so that a metric leaves the network as it found it."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lthlib.core.errors import UserError
from lthlib.metrics.arrays import check_labels
from lthlib.networks.checks import check_deterministic, check_own_weights, copied
from lthlib.pruning.masks import apply_

CHUNK = 250  # images at a time where nothing is differentiated twice


class Frozen:
    """A copy of a network in evaluation mode, with its masked weights at zero, and a batch; all checked.

    Attributes:
        model: The copy; pixels in [0, 1] in, logits out.
        images: Float images, shape (N, channels, height, width).
        labels: Class indices, shape (N,).
        weights: Parameter name -> weights times mask, without gradient.
        masks: Parameter name -> bool tensor, True where a weight is active; only the parameters that have one.
        classes: The number of logits.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, masks: Mapping[str, Tensor] | None = None):
        """Warn about a batch of one class (a sorted data set, cut off).

        Raises:
            UserError: For an empty batch, images that are not float, labels that do not fit, masks that do not or leave
                no weight, and a network that has no one loss for each image, see `check_deterministic`.
        """
        if not images.is_floating_point() or len(images) == 0:
            raise UserError(
                "Images must be a non-empty float tensor (N, channels, height, width) with pixels in [0, 1]; "
                f"got {tuple(images.shape)} of {images.dtype}."
            )
        self.model, self.images = copied(model).eval().requires_grad_(False), images
        self.weights = dict(self.model.named_parameters())
        self.masks = {name: mask.to(images.device) for name, mask in (masks or {}).items()}
        apply_(self.model, self.masks)
        if not any(self.active(name) for name in self.weights):
            raise UserError("The masks leave no weight active, so there is no curvature to measure.")
        self._holders: dict[int, list[str]] = {}
        for prefix, module in self.model.named_modules():
            for name, weight in module.named_parameters(prefix, recurse=False):
                self._holders.setdefault(id(weight), []).append(name)
        found = check_deterministic(self.model, images)
        check_own_weights(self.model, found)
        self.classes = found[0][1].shape[1]
        check_labels(labels, len(images), self.classes)
        self.labels = labels.long()  # cross-entropy takes no other whole numbers
        if len(labels) > 1 and bool((labels == labels[0]).all()):
            warnings.warn(
                f"All {len(labels)} images have the label {int(labels[0])}: the result speaks of that class "
                "alone. Shuffle the data set before cutting a batch from it.",
                stacklevel=3,
            )

    def __call__(self, images: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits, shape (N, C), with ``weights`` in place of the network's own where given."""
        # A weight that modules share is given to each; a module with two names is given it once.
        given = {h: value for name, value in (weights or {}).items() for h in self._holders[id(self.weights[name])]}
        with sdpa_kernel(SDPBackend.MATH):  # the only attention that can be differentiated twice
            return functional_call(self.model, given, (images,), tie_weights=False)

    @torch.no_grad()
    def logits(self, weights: Mapping[str, Tensor] | None = None, images: Tensor | None = None) -> Tensor:
        """Return the logits of all images, without gradients."""
        images = self.images if images is None else images
        return torch.cat([self(part, weights) for part in images.split(CHUNK)])

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy over the batch in nats, with a graph; `UserError` where it is not finite."""
        return check_finite(F.cross_entropy(self(self.images, weights), self.labels))

    def active(self, name: str) -> int:
        """Return the number of weights of one parameter that no mask removes."""
        return int(self.masks[name].sum()) if name in self.masks else self.weights[name].numel()


def check_finite(values: Tensor) -> Tensor:
    """Return ``values``; `UserError` where one of them is NaN or infinite."""
    if not bool(torch.isfinite(values.detach()).all()):
        raise UserError(
            "The network's loss on this batch is not finite, so no curvature exists there: "
            "look for NaN or infinite weights or pixels (a diverged training?)."
        )
    return values


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Say in words, as a `UserError`, which operation PyTorch can differentiate only once."""
    try:
        yield
    except RuntimeError as error:
        missing = re.search(r"derivative for aten::(\w+?)(_backward)? is not implemented", str(error))
        if missing is None:
            raise
        raise UserError(
            f"PyTorch cannot differentiate {missing[1]} twice, so the network has no Hessian to multiply with: put "
            f"the same function in simple operations in its place (clamp, multiplication)."
        ) from error


def normal_like(like: Tensor, *key: int) -> Tensor:
    """Return standard normal numbers of the shape of ``like`` that depend on ``key`` alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def rademacher_like(like: Tensor, *key: int) -> Tensor:
    """Return +1 and -1 with equal probability, of the shape of ``like``; they depend on ``key`` alone."""
    return normal_like(like, *key).sign_().add_(0.5).sign_()
