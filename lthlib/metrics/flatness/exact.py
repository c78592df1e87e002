r"""Exact Hessian traces of the cross-entropy, in the weights and in the pixels.

In a piecewise-linear network every logit z_c is affine in each single weight w_j (and in each pixel), away from
kinks, so d²z_c/dw_j² = 0. The chain rule then leaves, on the diagonal, the Gauss-Newton part alone:

    d²L/dw_j² = 1/N Σ_i (dz_i/dw_j)ᵀ (diag(p_i) - p_i p_iᵀ) (dz_i/dw_j) = 1/N Σ_i Σ_k (v_ikᵀ dz_i/dw_j)²,

where v_i1 .. v_i,C-1 factor the softmax's Hessian (`sample_factor`). So C - 1 vector-Jacobian products with
the squared gradient of every image give every diagonal entry of the Hessian, with no randomness. In the
pixels more holds: logits are affine in all pixels at once, so the Hessian *is* its Gauss-Newton part, and its
eigenvalues are those of a (C - 1) x (C - 1) Gram matrix.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.grad import conv2d_weight

from lthlib.core.errors import UserError, choose
from lthlib.metrics.flatness.frozen import Frozen, check_finite, evaluating, norms_behind, sample_factor
from lthlib.metrics.flatness.piecewise import nonlinear_parts

GRADIENT_BYTES = 2**28


@dataclass(frozen=True)
class WeightTrace:
    """The trace of the weight Hessian of the mean cross-entropy, and the parts it is made of.

    Attributes:
        total: tr(M H M) in nats; M keeps the active weights.
        relative: Σ_j w_j² H_jj over the active weights, in nats: unchanged when a layer is rescaled and the
            next normalisation undoes it, as the total is not.
        active: Parameter name -> number of its weights that no mask removes.
        per_parameter: Parameter name -> its share of the total; empty where the method gives no shares.
        relative_per_parameter: The same for ``relative``.
        per_image: Contribution of each image, shape (N,), with mean ``total``; None from an estimator.
        relative_per_image: The same for ``relative``.
        method: ``"exact"``, or the estimator: ``"hutchinson"``, ``"hutchpp"``, ``"xtrace"``.
        standard_error: Of ``total`` from the random probes; 0 for the exact method. What another batch of
            images would change is another matter, see `image_interval`.
        relative_standard_error: The same for ``relative``.
        products: Vector-Jacobian products (exact) or Hessian-vector products (estimator) that it took.
        reason: Why an estimator was used; empty for the exact method.
    """

    total: float
    relative: float
    active: dict[str, int]
    per_parameter: dict[str, float] = field(default_factory=dict)
    relative_per_parameter: dict[str, float] = field(default_factory=dict)
    per_image: Tensor | None = None
    relative_per_image: Tensor | None = None
    method: str = "exact"
    standard_error: float = 0.0
    relative_standard_error: float = 0.0
    products: int = 0
    reason: str = ""

    @property
    def per_weight(self) -> float:
        """The total divided by the number of active weights: comparable across sparsities."""
        return self.total / sum(self.active.values())

    def per_layer(self, relative: bool = False) -> dict[str, float]:
        """Sum the shares over each module's parameters: module name -> trace (or relative flatness)."""
        return self._grouped(lambda name: name.rpartition(".")[0], relative)

    def per_group(self, model: nn.Module, relative: bool = False) -> dict[str, float]:
        """Sum the shares over kinds of parameter: ``"Conv2d.weight"``, ``"BatchNorm2d.bias"``, ..."""
        owner, _, _ = zip(*(name.rpartition(".") for name in self.active), strict=True)
        kinds = {name: type(model.get_submodule(name)).__name__ for name in owner}
        return self._grouped(lambda name: f"{kinds[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}", relative)

    def _grouped(self, key: Callable[[str], str], relative: bool) -> dict[str, float]:
        sums: dict[str, float] = {}
        for name, value in (self.relative_per_parameter if relative else self.per_parameter).items():
            sums[key(name)] = sums.get(key(name), 0.0) + value
        return sums


@dataclass(frozen=True)
class InputHessian:
    """The Hessian of each image's own cross-entropy in its pixels, units nats per pixel², pixels in [0, 1].

    Attributes:
        trace: Per image, shape (N,).
        top: Largest eigenvalue per image, shape (N,).
        method: ``"exact"``, or ``"hutchinson+lanczos"`` for a network that is not piecewise linear.
        trace_standard_error: Per image, from the random probes; zeros for the exact method.
        top_residual: Per image: an eigenvalue lies within this distance of ``top``; zeros for the exact
            method.
        reason: Why the estimator was used; empty for the exact method.
    """

    trace: Tensor
    top: Tensor
    method: str
    trace_standard_error: Tensor
    top_residual: Tensor
    reason: str = ""

    @property
    def legacy_batch_eigenvalue(self) -> float:
        """What the paper's code reports: the top eigenvalue of the batch's *mean* loss, max_i top_i / N.

        The joint Hessian of the mean loss is block diagonal with blocks H_i / N, so this number halves when
        the batch is doubled with images no sharper.
        """
        return float(self.top.max()) / len(self.top)


# ------------------------------------------------------------------------------------------------ the weights


def weight_hessian_trace(
    model: nn.Module, images: Tensor, labels: Tensor, masks: Mapping[str, Tensor] | None = None, chunk: int = 50
) -> WeightTrace:
    """Compute the trace of the weight Hessian exactly, for a piecewise-linear network (lower is flatter).

    The Hessian of the mean cross-entropy over the batch in all parameters (convolutions, batch norm, linear
    layers), restricted to the active ones, at the masked weights. It takes C - 1 vector-Jacobian products;
    memory grows with ``chunk``, not with the number of images.

    Args:
        model: Network in the mode in which it is to be measured (eval: batch norm must use its running
            statistics).
        images: Pixels in [0, 1], shape (N, channels, height, width).
        labels: Class indices, shape (N,). In a piecewise-linear network the trace does not depend on them.
        masks: Parameter name -> bool tensor, True where a weight is active; None for a dense network.
        chunk: How many images at a time.

    Returns:
        The total, its shares per parameter and per image, the relative flatness with the same shares.

    Raises:
        UserError: For a network to which the identity does not apply, with its parts named (`weight_trace`
            estimates there), a loss that is not finite, and what `Frozen` refuses.
    """
    frozen = Frozen(model, images, labels, masks)
    obstacles = trace_obstacles(frozen)
    if obstacles:
        raise UserError(
            f"The exact weight-Hessian trace does not hold for this network: {'; '.join(obstacles)}. "
            "Call weight_trace() of lthlib.metrics.flatness.measure: it estimates the trace, with a standard error."
        )
    return exact_trace(frozen, chunk)


def trace_obstacles(frozen: Frozen) -> tuple[str, ...]:
    """Name what keeps the trace from being exact: nonlinear parts, parameters and layers without a rule."""
    held = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in frozen.model.named_modules()
        if _rule(module) is not None
        for name in ("weight", "bias")
    }
    foreign = [
        f"no rule for the gradients of {name} (of {type(frozen.model.get_submodule(name.rpartition('.')[0])).__name__})"
        for name in frozen.weights
        if name not in held
    ]
    return (*nonlinear_parts(frozen.model, frozen.images), *foreign, *_reshaped(frozen))


def _reshaped(frozen: Frozen) -> list[str]:
    """Name the layers that do not see one image per row, and weights that are used without a call of their module."""
    images, found, called = frozen.images[:2], [], set()
    leaves = {name: weight.clone().requires_grad_() for name, weight in frozen.weights.items()}

    def look(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        called.add(name)
        if len(output) != len(images) or (isinstance(module, nn.Linear) and output.dim() != 2):
            found.append(f"no rule for {name}, which sees shape {tuple(inputs[0].shape)} for {len(images)} images")

    with _watching(frozen.model, look), torch.enable_grad():
        logits = frozen(images, leaves)
    missed = {
        name: leaf
        for name, leaf in leaves.items()
        if name.rpartition(".")[0] not in called and _rule(frozen.model.get_submodule(name.rpartition(".")[0]))
    }
    reached = grad(logits.sum(), list(missed.values()), allow_unused=True) if missed and logits.requires_grad else ()
    astray = [name for name, gradient in zip(missed, reached, strict=False) if gradient is not None]
    return [*found, *(f"no rule for {name}, which is used without a call of its module" for name in astray)]


@contextlib.contextmanager
def _watching(model: nn.Module, look: Callable) -> Iterator[None]:
    """Call ``look(name, module, inputs, output)`` on the raw output of every module that has a rule."""
    handles = [
        module.register_forward_hook(partial(look, name), prepend=True)
        for name, module in model.named_modules()
        if _rule(module) is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def exact_trace(frozen: Frozen, chunk: int) -> WeightTrace:
    """Compute the trace of a batch that is checked already, for a network without obstacles."""
    measures = {name: _measures(weight, frozen.masks.get(name)) for name, weight in frozen.weights.items()}
    parts = [_squared_gradients(frozen, images, measures) for images in frozen.images.split(chunk)]
    images = {name: torch.cat([part[name] for part in parts]) for name in measures}
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
        products=frozen.classes - 1,
    )


def _measures(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Return the factors of a squared gradient, shape (weights, 2): 1 or 0, and the squared weight."""
    active = torch.ones_like(weight) if mask is None else mask.to(weight.dtype)
    return torch.stack([active.flatten(), weight.flatten().square()], dim=1)


def _squared_gradients(frozen: Frozen, images: Tensor, measures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return, per parameter, Σ_k of each image's squared gradient of v_kᵀz, weighted, shape (n, 2)."""
    sums = {name: images.new_zeros(len(images), 2) for name in measures}

    def add(name: str, gradient: Tensor) -> None:
        sums[name] += gradient.flatten(1).square() @ measures[name]

    pixels = images.detach().requires_grad_()
    with _watching(frozen.model, partial(_hand_over, add)), torch.enable_grad():
        logits = check_finite(frozen(pixels))
    for direction in sample_factor(logits.detach()):
        grad(logits, pixels, direction, retain_graph=True)
    return sums


def _hand_over(add: Callable, prefix: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Hand the gradients of a module's parameters to ``add`` whenever the gradient of its output arrives."""
    gradients = _rule(module)(module, inputs[0].detach())
    names = {name: f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters(recurse=False)}

    def receive(output_gradient: Tensor) -> None:
        for name, gradient in gradients(output_gradient):
            if name in names:
                add(names[name], gradient)

    output.register_hook(receive)


def _rule(module: nn.Module) -> Callable | None:
    """Return the rule for the gradients of each image; None for subclasses that may compute otherwise."""
    if "forward" in vars(module):
        return None
    for kind, rule in _RULES.items():
        methods = ("forward", "_conv_forward") if kind is nn.Conv2d else ("forward",)
        if isinstance(module, kind) and all(
            getattr(type(module), method) is getattr(kind, method) for method in methods
        ):
            return rule
    return None


def _conv_gradients(conv: nn.Conv2d, x: Tensor) -> Callable:
    padding = conv.padding
    if conv.padding_mode != "zeros" or isinstance(padding, str):
        # The private attribute is what Conv2d itself pads with, for "same" and for modes other than zeros.
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode), 0
    n = len(x)
    shape = (n * conv.out_channels, *conv.weight.shape[1:])
    grouped = x.reshape(1, -1, *x.shape[2:])

    def gradients(g: Tensor):
        # Images as groups of one convolution: the library's fast kernel, and no copy of the patches.
        of_groups = g.reshape(1, -1, *g.shape[2:])
        yield (
            "weight",
            conv2d_weight(grouped, shape, of_groups, conv.stride, padding, conv.dilation, n * conv.groups).unflatten(
                0, (n, -1)
            ),
        )
        if conv.bias is not None:
            yield "bias", g.sum((2, 3))

    return gradients


def _linear_gradients(linear: nn.Linear, x: Tensor) -> Callable:
    def gradients(g: Tensor):
        yield "weight", g[:, :, None] * x[:, None, :]
        yield "bias", g

    return gradients


def _norm_gradients(norm: nn.BatchNorm2d, x: Tensor) -> Callable:
    x = x.reshape(len(x), norm.num_features, -1)
    mean, scale = norm.running_mean, (norm.running_var + norm.eps).rsqrt()

    def gradients(g: Tensor):
        g = g.reshape(x.shape)
        shift = g.sum(2)
        yield "weight", ((g * x).sum(2) - mean * shift) * scale
        yield "bias", shift

    return gradients


_RULES = {
    nn.Conv2d: _conv_gradients,
    nn.Linear: _linear_gradients,
    nn.BatchNorm1d: _norm_gradients,
    nn.BatchNorm2d: _norm_gradients,
}


# ------------------------------------------------------------------------------------------------- the pixels


def exact_input_hessian(frozen: Frozen, chunk: int | None = None) -> InputHessian:
    """Compute trace and top eigenvalue of each image's Hessian in its pixels, for a piecewise-linear network.

    It takes C - 1 vector-Jacobian products, and one (C - 1) x (C - 1) Gram matrix per image.

    Args:
        frozen: The checked batch.
        chunk: Images at a time; None: as many as keep their Jacobians below 256 MB.

    Raises:
        UserError: For a loss that is not finite.
    """
    images = frozen.images
    bytes_per_image = frozen.classes * images[0].numel() * images.element_size()
    chunk = chunk or max(1, min(100, GRADIENT_BYTES // bytes_per_image))
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


# ------------------------------------------------------------------------------------------------ the caveats


def rescale_conv(model: nn.Module, layer: str, factor: float, images: Tensor) -> nn.Module:
    """Return a copy with one convolution's weights multiplied, and the batch norm behind it set to undo that.

    The copy computes the same function (in eval mode), yet its Hessian in that layer's weights is the
    original's divided by factor²: a trace says nothing before the scale of the weights is taken into account
    (Dinh et al. 2017). The running mean takes the factor, the running variance its square, the norm's epsilon
    included.

    Args:
        model: The network; left as it is.
        layer: Name of a convolution whose output goes into one batch norm and nowhere else.
        factor: What its weights (and bias) are multiplied with, above 0.
        images: One image or more, to see which batch norm follows.

    Raises:
        UserError: For an unknown layer, a factor that is not positive and finite, and where no batch norm
            follows.
    """
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    choose(layer, convolutions, "convolution")
    if not (math.isfinite(factor) and factor > 0):
        raise UserError(f"The factor must be positive and finite, got {factor}.")
    with evaluating(model):
        frozen = Frozen(model, images[:1], torch.zeros(1, dtype=torch.long, device=images.device))
        behind = norms_behind(frozen)
    if layer not in behind:
        raise UserError(
            f"The convolution {layer!r} is not followed by one batch norm alone, so nothing undoes its "
            f"rescaling. Convolutions that are: {', '.join(behind) or 'none'}."
        )
    scaled = copy.deepcopy(model)
    norm, conv = scaled.get_submodule(behind[layer]), scaled.get_submodule(layer)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.mul_(factor)
        norm.running_mean.mul_(factor)
        norm.running_var.copy_(factor**2 * (norm.running_var + norm.eps) - norm.eps)
    return scaled


def image_interval(per_image: Tensor, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return a bootstrap interval (BCa) for the mean over images, as if the batch were drawn again.

    Args:
        per_image: Contributions of the images, shape (N,), N at least 2.
        level: Confidence level.
        seed: Of the resampling.

    Raises:
        UserError: For fewer than two images.
    """
    from scipy.stats import bootstrap

    values = per_image.detach().double().cpu().numpy()
    if len(values) < 2:
        raise UserError("An interval over images needs at least two images.")
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, confidence_level=level, n_resamples=2000, rng=np.random.default_rng(seed))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
