"""A model held still: every computation runs on copies, so that a metric leaves the model as it found it."""

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

from lthlib.core.errors import UserError, suggest


class Frozen:
    """A model, a batch and masks, checked; the weights are masked copies, the buffers are copies.

    Calling it runs the model without touching weights, running statistics, gradients or flags. The training
    mode is the model's own: a metric measures the network as it is handed over.

    Attributes:
        model: The network, pixels in [0, 1] in, logits out.
        images: Float images, shape (N, channels, height, width).
        labels: Class indices, shape (N,).
        weights: Parameter name -> weights times mask, without gradient.
        masks: Parameter name -> bool tensor, True where a weight is active; only the parameters that have
            one.
        classes: The number of logits.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, masks: Mapping[str, Tensor] | None = None):
        """Check everything; see `check_batch` and `check_masks` for what raises `UserError`.

        Raises:
            UserError: Also where the network draws random numbers (active dropout): it has no one loss then.
        """
        check_batch(images, labels)
        self.model, self.images, self.labels = model, images, labels
        self.masks = check_masks(model, masks)
        self.weights = {name: self._masked(name, w.detach()) for name, w in model.named_parameters()}
        self.buffers = {name: b.detach() for name, b in model.named_buffers()}
        if draws_random_numbers(model, images):
            raise UserError(
                "The network draws random numbers in its forward pass (dropout in training mode?), so its "
                "loss is not one function of the weights: call model.eval() first."
            )
        self.classes = self._count_classes()

    def __call__(self, images: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits, shape (N, C), with ``weights`` in place of the model's own where given."""
        buffers = {name: b.clone() for name, b in self.buffers.items()} if self.training else self.buffers
        with sdpa_kernel(SDPBackend.MATH):  # the only attention that can be differentiated twice
            return stateless(self.model, {**self.weights, **buffers, **(weights or {})}, images)

    def loss(self, weights: Mapping[str, Tensor] | None = None, images: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy over the batch in nats.

        Raises:
            UserError: Where it is not finite.
        """
        loss = F.cross_entropy(self(self.images if images is None else images, weights), self.labels)
        return check_finite(loss)

    def active(self, name: str) -> int:
        """Return the number of weights of one parameter that no mask removes."""
        return int(self.masks[name].sum()) if name in self.masks else self.weights[name].numel()

    @property
    def training(self) -> bool:
        """Whether any module is in training mode."""
        return any(module.training for module in self.model.modules())

    def _masked(self, name: str, weight: Tensor) -> Tensor:
        return weight * self.masks[name] if name in self.masks else weight

    def _count_classes(self) -> int:
        with torch.no_grad():
            logits = self(self.images[:2])
        if logits.dim() != 2:
            raise UserError(f"The network must return logits of shape (N, C), got {tuple(logits.shape)}.")
        if int(self.labels.max()) >= logits.shape[1] or int(self.labels.min()) < 0:
            raise UserError(
                f"Labels must lie in 0..{logits.shape[1] - 1}, one per logit; "
                f"got {int(self.labels.min())}..{int(self.labels.max())}."
            )
        return logits.shape[1]


def stateless(model: nn.Module, state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return ``model(images)`` with the tensors of ``state`` in place of its own, and leave it as it was.

    PyTorch's `functional_call` alone does not where one module has two names: it leaves a plain tensor for its
    parameter. So every module is named once here, and a tensor that several modules share is given to each.
    """
    tensors = dict(_tensors(model, once=False))
    holders: dict[int, list[str]] = {}
    for name, tensor in _tensors(model, once=True):
        holders.setdefault(id(tensor), []).append(name)
    named = {
        holder: value
        for name, value in state.items()
        for holder in (holders[id(tensors[name])] if name in tensors else [name])
    }
    return functional_call(model, named, (images,), tie_weights=False)


def _tensors(model: nn.Module, once: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the names of all parameters and buffers; ``once``: of each module under its first name alone."""
    for prefix, module in model.named_modules(remove_duplicate=once):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, tensor


def check_batch(images: Tensor, labels: Tensor) -> None:
    """Refuse what is no batch, warn about a batch of one class (a sorted data set, cut off).

    Raises:
        UserError: For an empty batch, images that are not float, labels that are not whole numbers, or
            unequal counts.
    """
    if not torch.is_floating_point(images) or images.dim() < 2 or len(images) == 0:
        raise UserError(
            "Images must be a non-empty float tensor (N, channels, height, width) with pixels in [0, 1]; "
            f"got {tuple(images.shape)} of {images.dtype}."
        )
    if torch.is_floating_point(labels) or labels.shape != images.shape[:1]:
        raise UserError(
            f"Labels must be one class index per image, shape ({len(images)},); "
            f"got {tuple(labels.shape)} of {labels.dtype}."
        )
    if len(labels) > 1 and bool((labels == labels[0]).all()):
        warnings.warn(
            f"All {len(labels)} images have the label {int(labels[0])}: the result speaks of that class "
            "alone. Shuffle the data set before cutting a batch from it.",
            stacklevel=3,
        )


def check_masks(model: nn.Module, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the masks as a dict, True where a weight is active.

    Raises:
        UserError: For a name that is no parameter, a mask that is not bool, another shape than the
            weight's, and masks that leave no weight at all.
    """
    parameters = dict(model.named_parameters())
    for name, mask in (masks or {}).items():
        if name not in parameters:
            raise UserError(f"The mask {name!r} belongs to no parameter.{suggest(name, parameters)}")
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise UserError(
                f"The mask {name!r} must be bool of shape {tuple(parameters[name].shape)}; "
                f"got {mask.dtype} of {tuple(mask.shape)}."
            )
    if not any((masks or {}).get(name, weight).any() for name, weight in parameters.items()):
        raise UserError("The masks leave no weight active, so there is no curvature to measure.")
    return {name: mask.to(parameters[name].device) for name, mask in (masks or {}).items()}


def check_finite(values: Tensor) -> Tensor:
    """Return ``values``.

    Raises:
        UserError: Where one of them is NaN or infinite.
    """
    if not bool(torch.isfinite(values.detach()).all()):
        raise UserError(
            "The network's loss on this batch is not finite, so no curvature exists there: "
            "look for NaN or infinite weights or pixels (a diverged training?)."
        )
    return values


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Say in words which operation PyTorch can differentiate only once.

    Raises:
        UserError: Where the network holds one.
    """
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


def draws_random_numbers(model: nn.Module, images: Tensor) -> bool:
    """Tell whether a forward pass consumes random numbers (active dropout, noise layers); restores them."""
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad():
        before = _random_state(images)
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        stateless(model, buffers, images[:2])
        return not torch.equal(before, _random_state(images))


def _random_state(images: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(images.device) if images.is_cuda else torch.random.get_rng_state()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold every module in eval mode, and give each its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def normal_like(like: Tensor, *key: int) -> Tensor:
    """Return standard normal numbers of the shape of ``like`` that depend on ``key`` alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def rademacher_like(like: Tensor, *key: int) -> Tensor:
    """Return +1 and -1 with equal probability, of the shape of ``like``; they depend on ``key`` alone."""
    return normal_like(like, *key).sign_().add_(0.5).sign_()
