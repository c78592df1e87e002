"""GraSP: preserve the gradient's flow at initialisation (Wang et al. 2020).

Removing weight q is the step delta = -w_q e_q. To first order it changes the squared norm of the gradient by
2 delta^T H g = -2 w_q (Hg)_q. S = -w * Hg is large where removal lets the gradient grow: those weights go, the lowest S
stay; the score is -S. Hg is the gradient of z = <g, dL/dw> with the first g held fixed: one double backward pass.

What follows, and is tested: where a batch normalisation uses the batch's statistics, scaling the layer's weights by c
divides its gradient by c, so by Euler's theorem sum(S) over the layer is ||g_layer||^2.

As published: logits are divided by T = 200; the batch has k images of each class *sorted by class*, and is passed in
two halves, which then hold different classes - it matters, since BN sees each half alone; g is the sum over both;
linear layers are drawn anew for the scoring, and take part in g and H though they are never pruned here. The published
threshold keeps one weight too many; here the count is exact. The sign: ports that keep the *highest* S by mistake find
something else. ReLUs must not work in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, autograd, nn

from lthlib.pruning import masks as masking
from lthlib.pruning.registry import Found, Moment, Option, method
from lthlib.pruning.snip import BN_MODE

Batch = tuple[Tensor, Tensor]


def hessian_gradient(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Sequence[Batch], temperature: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return g and Hg of the summed loss of ``batches`` over ``weights``.

    The loss of each batch is the mean cross-entropy of logits / temperature.
    """
    tensors = list(weights.values())

    def gradients(batch: Batch, *, create_graph: bool) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(model(batch[0]) / temperature, batch[1])
        return autograd.grad(loss, tensors, create_graph=create_graph, materialize_grads=True)

    g = [sum(parts) for parts in zip(*(gradients(batch, create_graph=False) for batch in batches), strict=True)]
    hg = [torch.zeros_like(w) for w in tensors]
    for batch in batches:
        z = sum((a * b).sum() for a, b in zip(g, gradients(batch, create_graph=True), strict=True))
        for total, part in zip(hg, autograd.grad(z, tensors, materialize_grads=True), strict=True):
            total += part
    return dict(zip(weights, g, strict=True)), dict(zip(weights, hg, strict=True))


def halves(images: Tensor, labels: Tensor, iterations: int) -> Iterator[Batch]:
    """Sort a batch by class, cut each class into ``iterations`` parts, and each class-sorted part in halves."""
    by_class = [(labels == c).nonzero()[:, 0].tensor_split(iterations) for c in labels.unique()]
    for parts in zip(*by_class, strict=True):
        for places in torch.cat(parts).tensor_split(2):
            yield images[places], labels[places]


@method(
    "grasp",
    title="GraSP",
    source="init",
    start="init",
    options={
        "samples_per_class": Option(10, least=1),
        "iterations": Option(1, least=1),
        "temperature": Option(200.0, above=0),
        "bn_mode": BN_MODE,
        "reinit_linear": True,
        "with_linear": True,
    },
    reference="wang2020picking",
    family="initialisation",
    paper=True,
)
def grasp(moment: Moment) -> Found:
    """Keep the weights with the lowest -w * Hg.

    Options: ``samples_per_class`` per iteration (published: 10 for CIFAR-10, 5 for CIFAR-100, 1 for ImageNet),
    ``iterations`` (1, 2, 150), ``temperature``, ``bn_mode`` ("train" or "eval"). Of linear layers that are not pruned,
    ``with_linear`` lets the weights take part in g and H, and ``reinit_linear`` draws these anew for the scoring.
    """
    options, pruned = moment.options, moment.weights
    model = moment.model.train(options["bn_mode"] == "train")
    generator = torch.Generator().manual_seed(moment.seed)
    for name, module in model.named_modules():
        is_redrawn = isinstance(module, nn.Linear) and f"{name}.weight" not in pruned
        if is_redrawn and options["with_linear"] and options["reinit_linear"]:
            weight = torch.empty(module.weight.shape, dtype=module.weight.dtype)  # drawn alike on every device
            module.weight.data.copy_(nn.init.xavier_normal_(weight, generator=generator))
    images, labels = moment.batch(per_class=options["samples_per_class"] * options["iterations"])
    batches = list(halves(images, labels, options["iterations"]))
    weights = {**masking.prunable(model, "all"), **pruned} if options["with_linear"] else pruned
    _, hg = hessian_gradient(model, weights, batches, options["temperature"])
    return Found({name: w.detach() * hg[name] for name, w in pruned.items()})
