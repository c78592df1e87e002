"""The loss landscape: a line between two networks, a plane around one, a plane of inputs; what rescaling does.

Networks, images (N, channels, height, width) in [0, 1], labels (N,) and masks are as `Frozen` takes them; the network
is measured in evaluation mode and left as it was found.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lthlib.core.errors import UserError, choose
from lthlib.metrics.flatness.frozen import CHUNK, Frozen, check_finite, normal_like, rademacher_like
from lthlib.networks.checks import copied


@dataclass(frozen=True)
class LossPath:
    """Loss (mean cross-entropy in nats) and error (fraction misclassified) on the straight line between two networks.

    At the positions ``t``, from 0 (the first network) to 1 (the second); all of shape (points,).
    """

    t: np.ndarray
    loss: np.ndarray
    error: np.ndarray

    @property
    def loss_barrier(self) -> float:
        """max_t [L(t) - (1-t) L(0) - t L(1)], at least 0; 0 is linear mode connectivity (lower is better)."""
        return self._barrier(self.loss)

    @property
    def error_barrier(self) -> float:
        """The same of the error, a fraction; lower is better."""
        return self._barrier(self.error)

    def _barrier(self, values: np.ndarray) -> float:
        return float((values - (1 - self.t) * values[0] - self.t * values[-1]).max())


@dataclass(frozen=True)
class LossSurface:
    """Mean cross-entropy on a plane, (points of a, points of b), at steps ``a`` and ``b`` along two directions."""

    a: np.ndarray
    b: np.ndarray
    loss: np.ndarray


def interpolate(
    model: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    points: int = 11,
    statistics: str = "interpolate",
) -> LossPath:
    """Measure loss and error between two networks of one architecture (linear mode connectivity).

    The model's own weights play no part, only those of ``state_a`` at t = 0 (a ``state_dict``, for instance of the
    dense network) and of ``state_b`` at t = 1 (of the ticket, pruned weights as zeros). Of ``points`` positions, both
    ends included, barriers are maxima. With the ``statistics`` ``"interpolate"`` the line is drawn in batch norm's
    running statistics, too; ``"recompute"`` measures them anew at every point as the mean over batches of the images.
    """
    choose(statistics, ["interpolate", "recompute"], "treatment of batch-norm statistics")
    if points < 3:
        raise UserError(f"A barrier needs the two ends and at least one point between them; got {points} points.")
    if statistics == "recompute" and len(images) < 2:
        raise UserError("Batch norm's statistics need two images or more.")
    frozen = Frozen(model, images, labels)
    for state in (state_b, state_a):
        try:
            frozen.model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"The states to interpolate do not fit the model. Both must be state_dicts of this architecture, with "
                f"pruned weights as zeros: {error}"
            ) from error
    ts = np.linspace(0, 1, points)
    rows = []
    for t in ts:
        mixed = {
            name: torch.lerp(value, state_b[name].to(value.device), float(t)) if value.is_floating_point() else value
            for name, value in state_a.items()
        }
        frozen.model.load_state_dict(mixed)
        if statistics == "recompute":
            _measure_statistics(frozen.model, images)
        logits = frozen.logits()
        wrong = (logits.argmax(1) != frozen.labels).double().mean()
        rows.append((float(F.cross_entropy(logits, frozen.labels)), float(wrong)))
    loss, error = np.array(rows).T
    check_finite(torch.from_numpy(loss[[0, -1]]))
    return LossPath(ts, np.where(np.isfinite(loss), loss, np.inf), error)


def filter_normalised_surface(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Mapping[str, Tensor] | None = None,
    span: float = 1.0,
    points: int = 21,
    seed: int = 0,
) -> LossSurface:
    """Measure the loss on a random plane through a network, scaled filter by filter (Li et al. 2018).

    Every filter of a direction (and row of a linear layer) has the norm of the network's own filter, so that pictures
    of networks whose weights differ in scale can be compared. Biases and batch norm stay fixed, and pruned weights stay
    0. It is a picture: a plane shows two of very many directions.

    The plane reaches from -span to span in both directions; an odd number of points puts the network in the middle.
    `UserError` where the loss is finite nowhere, and as in `Frozen`.
    """
    frozen = Frozen(model, images, labels, masks)
    first, second = (_filter_normalised(frozen, seed, index) for index in (0, 1))
    steps = np.linspace(-span, span, points)

    def at(a: float, b: float) -> Tensor:
        moved = {name: frozen.weights[name] + a * first[name] + b * second[name] for name in first}
        return F.cross_entropy(frozen.logits(moved), frozen.labels)

    return _surface(at, steps, steps)


def adversarial_slice(
    model: nn.Module, images: Tensor, labels: Tensor, span: float = 8 / 255, points: int = 21, seed: int = 0
) -> LossSurface:
    """Measure the loss on a plane of inputs: along the sign of each image's gradient, and a random sign.

    Steps are changes of every pixel, in [0, 1] pixels: ``a`` runs from 0 to ``span`` (``a = eps`` at ``b = 0`` is FGSM
    with that eps), ``b`` from -span. Errors as in `Frozen`.
    """
    frozen = Frozen(model, images, labels)
    adversarial, signs = _gradient_signs(frozen), rademacher_like(images, seed)

    def at(a: float, b: float) -> Tensor:
        return F.cross_entropy(frozen.logits(images=(images + a * adversarial + b * signs).clamp(0, 1)), frozen.labels)

    return _surface(at, np.linspace(0, span, points), np.linspace(-span, span, points))


def _surface(at: Callable[[float, float], Tensor], a: np.ndarray, b: np.ndarray) -> LossSurface:
    loss = np.array([[float(at(float(x), float(y))) for y in b] for x in a])
    loss = np.where(np.isfinite(loss), loss, np.inf)  # far from the network
    check_finite(torch.tensor(loss.min()))
    return LossSurface(a, b, loss)


def _gradient_signs(frozen: Frozen) -> Tensor:
    signs = []
    for images, labels in zip(frozen.images.split(CHUNK), frozen.labels.split(CHUNK), strict=True):
        pixels = images.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(frozen(pixels), labels, reduction="sum")
        signs.append(torch.autograd.grad(loss, pixels)[0].sign())
    return torch.cat(signs)


def _filter_normalised(frozen: Frozen, seed: int, index: int) -> dict[str, Tensor]:
    direction = {}
    for position, (name, weight) in enumerate(frozen.weights.items()):
        if weight.dim() < 2:
            continue
        noise = normal_like(weight, seed, index, position)
        noise = noise * frozen.masks[name] if name in frozen.masks else noise
        norms = [x.flatten(1).norm(dim=1) for x in (weight, noise)]
        scale = norms[0] / norms[1].clamp_min(torch.finfo(weight.dtype).tiny)
        direction[name] = noise * scale.view(-1, *[1] * (weight.dim() - 1))
    return direction


@torch.no_grad()
def _measure_statistics(model: nn.Module, images: Tensor) -> None:
    """Set batch norm's running statistics to those of some images, the mean over batches."""
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.reset_running_stats()
        norm.momentum = None  # so that they are the mean
        norm.train()
    for batch in images.split(CHUNK):
        if len(batch) > 1:
            model(batch)
    model.eval()


def rescale_conv(model: nn.Module, layer: str, factor: float, images: Tensor) -> nn.Module:
    """Return a copy with one convolution's weights multiplied, and the batch norm behind it set to undo that.

    The copy computes the same function (in eval mode), yet its Hessian in that layer's weights is the original's
    divided by factor²: a trace says nothing before the scale of the weights is taken into account (Dinh et al. 2017).
    The running mean takes the factor, the running variance its square, the norm's epsilon included. The output of the
    convolution goes into one batch norm and nowhere else; some images show which, and that the logits stay.
    """
    choose(layer, [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)], "convolution")
    if not (math.isfinite(factor) and factor > 0):
        raise UserError(f"The factor must be positive and finite, got {factor}.")
    behind = norms_behind(model, images)
    if layer not in behind:
        raise UserError(
            f"The convolution {layer!r} is not followed by one batch norm alone, so nothing undoes its "
            f"rescaling. Convolutions that are: {', '.join(behind) or 'none'}."
        )
    scaled = copied(model)
    scaled.load_state_dict({**scaled.state_dict(), **_rescaled(scaled, layer, behind[layer], factor)})
    return scaled


def norms_behind(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Return convolution -> the batch norm that is given its output, where rescaling one is undone by the other.

    That is tried: the logits of two images, in eval mode, must stay.
    """
    network, pairs = copied(model).eval(), {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        if isinstance(module, nn.Conv2d):
            output.made_by = name
        elif inputs and hasattr(inputs[0], "made_by") and module.running_mean is not None:
            pairs[inputs[0].made_by] = name

    hooked = [(name, m) for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    handles = [module.register_forward_hook(partial(look, name=name)) for name, module in hooked]
    with torch.no_grad():
        logits = network(images[:2])
        for handle in handles:
            handle.remove()
        state, found = copy.deepcopy(network.state_dict()), {}
        for conv, norm in pairs.items():
            network.load_state_dict({**state, **_rescaled(model, conv, norm, 3.0)})
            if torch.allclose(network(images[:2]), logits, 1e-3, 1e-3 * float(logits.abs().max())):
                found[conv] = norm
    return found


def _rescaled(model: nn.Module, conv: str, norm: str, factor: float) -> dict[str, Tensor]:
    """Return what changes in the state when a convolution is multiplied and the norm behind it undoes that."""
    layer, behind = model.get_submodule(conv), model.get_submodule(norm)
    changed = {f"{conv}.{name}": factor * value.detach() for name, value in layer.named_parameters(recurse=False)}
    changed[f"{norm}.running_mean"] = factor * behind.running_mean
    changed[f"{norm}.running_var"] = factor**2 * (behind.running_var + behind.eps) - behind.eps
    return changed
