"""SynFlow: iterative synaptic flow, without data (Tanaka et al. 2020).

Make every parameter and every BN statistic absolute, feed an image of ones, and sum the outputs: R counts how much
flows through the network, R = sum over paths of the product of ``|w|``. A weight's score w dR/dw is the flow through
it. In a chain without biases each layer's scores sum to R, and what flows into a unit flows out of it; hence no layer
is emptied as long as each step removes less than R, which small steps make likely: 100 rounds, each from the network
that the last one left, with densities d^(k/100).

Known pitfalls. R grows like the product of the layers' widths: in float32 it overflows for WRN-28-10 (1.7e43) and
ResNet-50 (8.9e69), and even where it does not, some weights change; so float64. The ones enter the first convolution,
not the normalisation before it. Evaluation mode: on one constant image, batch statistics mean nothing. One round is
another method, with layer collapse; so are linear steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, autograd, nn

from lthlib.core.errors import UserError, choose
from lthlib.pruning import masks as masking
from lthlib.pruning.registry import Found, Moment, Option, method

SCHEDULES = ("exponential", "linear")


def linearize_(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Turn ``model`` into the network of absolute values, in evaluation mode and without normalisation."""
    model.to(dtype, memory_format=torch.contiguous_format).eval()
    if hasattr(model, "normalize"):
        model.normalize = nn.Identity()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.abs_()
    return model


def flow(
    model: nn.Module, weights: Mapping[str, Tensor], image_shape: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return R and the scores w dR/dw of some weights of a network made by `linearize_`.

    `UserError` where R or a score (names the layer) is not finite in the network's precision.
    """
    some = next(iter(weights.values()))
    total = model(torch.ones(1, *image_shape, dtype=some.dtype, device=some.device)).sum()
    if not total.isfinite():
        raise _not_finite("this network", some.dtype)
    gradients = autograd.grad(total, list(weights.values()), materialize_grads=True)
    scores = {name: g.mul_(w.detach()) for (name, w), g in zip(weights.items(), gradients, strict=True)}
    for name, score in scores.items():
        if not score.sum().isfinite():
            raise _not_finite(f"layer {name!r}", some.dtype)
    return total.detach(), scores


def _not_finite(what: str, dtype: torch.dtype) -> UserError:
    way = "use float64 (option precision)"
    if dtype == torch.float64:
        way = "look for infinite weights, scales or running statistics, or train with a lower learning rate"
    return UserError(f"The synaptic flow through {what} is not finite in {dtype}: {way}.")


def schedule(n_weights: int, n_keep: int, density: float, rounds: int, kind: str) -> list[int]:
    """Return how many weights stay after each of ``rounds`` rounds, as published: N - int((1 - d_k) N).

    d_k falls from 1 to the *nominal* density, exponentially or linearly. The last count is ``n_keep``, whatever
    rounding made of the nominal density; no count before it is lower.
    """
    choose(kind, SCHEDULES, "schedule")
    steps = [k / rounds for k in range(1, rounds)]
    shares = [density**t if kind == "exponential" else 1.0 - (1.0 - density) * t for t in steps]
    return [max(n_keep, n_weights - int((1.0 - share) * n_weights)) for share in shares] + [n_keep]


@method(
    "synflow",
    title="SynFlow",
    source="init",
    start="init",
    options={
        "rounds": Option(100, least=1, most=10_000),
        "schedule": Option("exponential", choices=SCHEDULES),
        "precision": Option("float64", choices=("float64", "float32")),
    },
    reference="tanaka2020pruning",
    family="initialisation",
    paper=True,
)
def synflow(moment: Moment) -> Found:
    """Remove the weights with the least flow, in many small rounds.

    Options: ``rounds``; ``schedule``, "exponential" or "linear"; ``precision``, "float64" or "float32".
    """
    options, masks, shape = moment.options, moment.masks, moment.batch(1)[0].shape[1:]
    model, first = linearize_(moment.model, getattr(torch, options["precision"])), None
    n_weights = masking.n_kept(masks)
    for n in schedule(n_weights, moment.n_keep, moment.density, options["rounds"], options["schedule"]):
        if first is None or n < masking.n_kept(masks):
            masking.apply_(model, masks)
            _, scores = flow(model, moment.weights, shape)
            first = first or scores
            masks = masking.keep_top(scores, n, within=masks)
    return Found(first, masks=masks)
