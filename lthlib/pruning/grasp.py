"""GraSP: preserve the gradient's flow at initialisation (Wang et al. 2020).

Removing weight q is the step delta = -w_q e_q. To first order it changes the squared norm of the gradient by
2 delta^T H g = -2 w_q (Hg)_q. The score S = -w * Hg is large where removal lets the gradient grow: those
weights go, the lowest S stay. Hg is the gradient of z = <g, dL/dw> with the first g held fixed: one double
backward pass.

What follows, and is tested: where a batch normalisation uses the batch's statistics, scaling the layer's
weights by c divides its gradient by c, so by Euler's theorem sum(S) over the layer is ||g_layer||^2.

As published: logits are divided by T = 200; the batch has k images of each class *sorted by class*, and is
passed in two halves, which then hold different classes - it matters, since BN sees each half alone; g is the
sum over both; linear layers are drawn anew for the scoring, and take part in g and H though they are never
pruned here. The published threshold keeps one weight too many; here the count is exact. The sign: ports that
keep the *highest* S by mistake find something else. ReLUs must not work in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, autograd, nn

from lthlib.core.errors import UserError
from lthlib.pruning import Found, Moment, Option, method
from lthlib.pruning import masks as masking
from lthlib.pruning.snip import BN_MODES, set_bn_mode

Batch = tuple[Tensor, Tensor]


def hessian_gradient(
    model: nn.Module, batches: list[Batch], temperature: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return g and Hg of the summed loss of ``batches``, for the prunable weights.

    Both are taken over the weights of all convolutions and linear layers; the loss of each batch is the mean
    cross-entropy of logits / temperature.
    """
    names, weights = _scored_weights(model)

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]) / temperature, batch[1])

    g = [torch.zeros_like(w) for w in weights]
    for batch in batches:
        _add_(g, autograd.grad(loss(batch), weights))
    hg = [torch.zeros_like(w) for w in weights]
    for batch in batches:
        gradient = autograd.grad(loss(batch), weights, create_graph=True)
        z = sum((a * b).sum() for a, b in zip(g, gradient, strict=True))
        _add_(hg, autograd.grad(z, weights))
    prunable = masking.prunable(model)
    by_name = {name: (a, b) for name, a, b in zip(names, g, hg, strict=True) if name in prunable}
    return {name: a for name, (a, _) in by_name.items()}, {name: b for name, (_, b) in by_name.items()}


def _scored_weights(model: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return [f"{name}.weight" if name else "weight" for name, _ in layers], [m.weight for _, m in layers]


def _add_(total: list[Tensor], parts: tuple[Tensor, ...]) -> None:
    for t, part in zip(total, parts, strict=True):
        t += part


def halves(images: Tensor, labels: Tensor, iterations: int) -> Iterator[Batch]:
    """Cut a class-sorted batch into ``iterations`` class-sorted ones, and each of those in halves."""
    classes = int(labels.unique().numel())
    if len(labels) % (classes * iterations):
        raise UserError(f"GraSP needs equally many images of each class; got {len(labels)} of {classes} classes.")
    by_class = torch.arange(len(labels)).view(classes, iterations, -1)
    for i in range(iterations):
        for places in by_class[:, i].flatten().tensor_split(2):
            yield images[places], labels[places]


def _redraw_linear(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight, generator=generator)


@method(
    "grasp",
    title="GraSP",
    source="init",
    start="init",
    options={
        "samples_per_class": Option(10, least=1),
        "iterations": Option(1, least=1),
        "temperature": Option(200.0, above=0),
        "bn_mode": Option("train", choices=BN_MODES),
        "reinit_linear": True,
    },
    reference="wang2020picking",
    family="initialisation",
    paper=True,
)
def find(moment: Moment) -> Found:
    """Keep the weights with the lowest -w * Hg.

    Options: ``samples_per_class`` per iteration (published: 10 for CIFAR-10, 5 for CIFAR-100, 1 for
    ImageNet), ``iterations`` (1, 2, 150), ``temperature``, ``bn_mode`` ("train" or "eval"),
    ``reinit_linear``.
    """
    options, model = moment.options, moment.model
    if options["reinit_linear"]:
        _redraw_linear(model, moment.seed)
    set_bn_mode(model, options["bn_mode"])
    images, labels = moment.batch(per_class=options["samples_per_class"] * options["iterations"])
    _, hg = hessian_gradient(model, list(halves(images, labels, options["iterations"])), options["temperature"])
    scores = {name: hg[name].mul_(w.detach()) for name, w in masking.prunable(model).items()}
    return Found(masking.keep_top(scores, moment.n_keep))
