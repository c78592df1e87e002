"""A model held still: every computation runs on copies, so that a metric leaves the model as it found it."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Container, Iterator, Mapping
from functools import partial

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


def norms_behind(frozen: Frozen) -> dict[str, str]:
    """Return convolution -> the batch norm that alone takes its output, for norms that use running statistics.

    It is read from the graph of a forward pass: nothing may stand between the two, no other operation may take the
    output, and no other the convolution's parameters.
    """
    leaves = {name: weight.clone().requires_grad_() for name, weight in frozen.weights.items()}
    logits, nodes = _graph(frozen, leaves)
    takers: dict[object, list[object]] = {}
    for node in upstream(logits.grad_fn, {}):
        for parent, _ in node.next_functions:
            takers.setdefault(parent, []).append(node)
    pairs = {}
    for norm, name in nodes.items():
        conv = norm.next_functions[0][0] if _has_running_statistics(frozen.model.get_submodule(name)) else None
        if conv in nodes and _holds(norm, name, leaves) and _alone(conv, nodes[conv], leaves, takers):
            pairs[nodes[conv]] = name
    with torch.no_grad():  # a subclass may do more with its weights than the graph tells
        other = folded(frozen, pairs, frozen.images[:2], frozen.weights)
    return pairs if torch.allclose(other, logits.detach(), 1e-3, 1e-4) else {}


def _graph(frozen: Frozen, leaves: Mapping[str, Tensor]) -> tuple[Tensor, dict[object, str]]:
    """Return the logits of two images, and the node of each convolution and batch norm that is called once -> name."""
    made: dict[str, list[object]] = {}

    def look(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        made.setdefault(name, []).append(output.grad_fn)

    handles = [
        module.register_forward_hook(partial(look, name))
        for name, module in frozen.model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
    ]
    try:
        with torch.enable_grad():
            logits = frozen(frozen.images[:2], leaves)
    finally:
        for handle in handles:
            handle.remove()
    return logits, {calls[0]: name for name, calls in made.items() if len(calls) == 1 and calls[0] is not None}


def _alone(conv: object, name: str, leaves: Mapping[str, Tensor], takers: Mapping[object, list]) -> bool:
    """Tell whether a node is the convolution of this name, and the only use of its parameters, with one taker."""
    nodes = [conv, *(parent for parent, _ in conv.next_functions[1:] if parent is not None)]
    return _holds(conv, name, leaves) and all(len(takers.get(node, ())) == 1 for node in nodes)


def _holds(node: object, name: str, leaves: Mapping[str, Tensor]) -> bool:
    """Tell whether a node's weight and bias are the module's parameters themselves."""
    found = [getattr(parent, "variable", None) for parent, _ in node.next_functions[1:3]]
    wanted = [leaves.get(f"{name}.{part}") for part in ("weight", "bias")]
    return len(found) == 2 and all(one is other for one, other in zip(found, wanted, strict=True))


def upstream(root: object, known: Container[object]) -> list:
    """Return the nodes that one of autograd's depends on and that are not known, itself last, each after its inputs."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen and node not in known:
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in node.next_functions)
    return order


def folded(frozen: Frozen, pairs: Mapping[str, str], images: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the logits with each batch norm of ``pairs`` multiplied into its convolution: the same function.

    Differentiating it twice is cheaper: the multiplication acts on weights, not on images.
    """
    weights, handles = dict(weights), []
    for conv, name in pairs.items():
        norm = frozen.model.get_submodule(name)
        scale = (frozen.buffers[f"{name}.running_var"] + norm.eps).rsqrt()
        scale = scale * weights.get(f"{name}.weight", 1)
        shift = weights.get(f"{name}.bias", 0) - frozen.buffers[f"{name}.running_mean"] * scale
        weights[f"{conv}.weight"] = weights[f"{conv}.weight"] * scale[:, None, None, None]
        if f"{conv}.bias" in weights:
            weights[f"{conv}.bias"] = weights[f"{conv}.bias"] * scale
        handles.append(norm.register_forward_hook(partial(_shift, shift[:, None, None])))
    try:
        return frozen(images, weights)
    finally:
        for handle in handles:
            handle.remove()


def _shift(shift: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return inputs[0] + shift


def _has_running_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and not module.training and module.running_mean is not None


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


def sample_factor(logits: Tensor) -> Tensor:
    r"""Return v_1..v_{C-1} with diag(p) - p pᵀ = Σ_k v_k v_kᵀ, the softmax's Hessian, for each image.

    With s = √p, diag(p) - p pᵀ = diag(s) (I - s sᵀ) diag(s). The reflection that takes s to -e_C has C - 1
    further columns, an orthonormal basis of what is orthogonal to s; they are scaled by s. No
    eigenvalue problem is solved, and a probability near 1 or 0 costs no accuracy beyond rounding.

    Args:
        logits: Shape (N, C).

    Returns:
        Shape (C - 1, N, C).
    """
    s = torch.softmax(logits, dim=1).sqrt()
    u = s.clone()
    u[:, -1] += 1
    reflection = torch.eye(s.shape[1], dtype=s.dtype, device=s.device) - (
        u[:, :, None] * u[:, None, :] / (1 + s[:, -1])[:, None, None]
    )
    return (s[:, :, None] * reflection[:, :, :-1]).permute(2, 0, 1)
