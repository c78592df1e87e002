"""SynFlow: iterative synaptic flow, without data (Tanaka et al. 2020).

Make every parameter and every BN statistic absolute, feed an image of ones, and sum the outputs: R counts how
much flows through the network, R = sum over paths of the product of |w|. A weight's score w dR/dw is the flow
through it. In a chain without biases each layer's scores sum to R, and what flows into a unit flows out of
it; hence a layer is never emptied while others are thinned, provided the pruning is iterative: 100 rounds,
each from the network that the last one left, with densities d^(k/100).

Known pitfalls. R grows like the product of the layers' widths: in float32 it overflows for WRN-28-10 (1.7e43)
and ResNet-50 (8.9e69), and even where it does not, some weights change; so float64. The ones enter the first
convolution, not the normalisation before it. Evaluation mode: on one constant image, batch statistics mean
nothing. One round is another method, with layer collapse; so are linear steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, autograd, nn

from lthlib import masks as masking
from lthlib.errors import UserError, choose
from lthlib.masks import Masks
from lthlib.pruners import Found, Moment, method


def linearize_(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Turn ``model`` into the network of absolute values, in evaluation mode and without normalisation."""
    model.to(dtype, memory_format=torch.contiguous_format).eval()
    if hasattr(model, "normalize"):
        model.normalize = nn.Identity()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.abs_()
    return model


def flow(model: nn.Module, image_shape: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return R and the score w dR/dw of every prunable weight of a network made by `linearize_`.

    Raises:
        UserError: Where R is not finite in the network's precision.
    """
    weights = masking.prunable(model)
    some = next(iter(weights.values()))
    total = model(torch.ones(1, *image_shape, dtype=some.dtype, device=some.device)).sum()
    if not total.isfinite():
        raise UserError(f"The synaptic flow through this network is not finite in {some.dtype}: use float64.")
    gradients = autograd.grad(total, list(weights.values()))
    scores = {n: g.mul_(w.detach()) for (n, w), g in zip(weights.items(), gradients, strict=True)}
    return total.detach(), scores


def schedule(n_weights: int, n_keep: int, rounds: int, kind: str) -> list[int]:
    """Return how many weights stay after each of ``rounds`` rounds; the last is ``n_keep``."""
    choose(kind, ("exponential", "linear"), "schedule")
    density = n_keep / n_weights
    steps = [k / rounds for k in range(1, rounds)]
    shares = [density**t if kind == "exponential" else 1 - (1 - density) * t for t in steps]
    return [max(n_keep, round(n_weights * share)) for share in shares] + [n_keep]


def drop_lowest_(scores: dict[str, Tensor], masks: Masks, n_kept: int, n_drop: int) -> dict[str, Tensor]:
    """Take the ``n_drop`` lowest of the scores kept out of ``masks``; return their flat indices by layer.

    As exact as `masks.keep_top`, and with its rule for ties, but it looks closely only at the scores below a
    bound guessed from a sample: a round drops few, and has to cost little beside the pass before it.

    Args:
        scores: Not negative, by layer.
        masks: Changed in place.
        n_kept: How many they keep.
        n_drop: How many to drop.
    """
    places = _below(scores, masks, _guess_bound(scores, masks, n_drop / n_kept))
    if sum(map(len, places.values())) < n_drop:
        places = _below(scores, masks, float("inf"))
    low = torch.cat([scores[name].reshape(-1)[indices] for name, indices in places.items()])
    goes = _lowest(low, n_drop).split([len(indices) for indices in places.values()])
    dropped = {name: indices[part] for (name, indices), part in zip(places.items(), goes, strict=True)}
    for name, indices in dropped.items():
        masks[name].view(-1)[indices] = False
    return dropped


def _lowest(scores: Tensor, n: int) -> Tensor:
    """Mark the ``n`` lowest of a flat tensor; among equals the last."""
    if n == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = float(np.partition(scores.cpu().numpy(), n - 1)[n - 1])
    goes = scores < threshold
    ties = n - int(goes.sum())
    goes[(scores == threshold).nonzero().view(-1)[-ties:]] = True
    return goes


def _guess_bound(scores: dict[str, Tensor], masks: Masks, fraction: float, sample: int = 1 << 14) -> float:
    stride = max(1, sum(s.numel() for s in scores.values()) // sample)
    seen = torch.cat([s.reshape(-1)[::stride][masks[n].view(-1)[::stride]] for n, s in scores.items()])
    rank = len(seen) * fraction
    rank = int(
        rank + 8 * rank**0.5 + 8
    )  # a generous margin: low scores come in clusters; too low is only slow
    return seen.kthvalue(rank).values.item() if rank <= len(seen) else float("inf")


def _below(scores: dict[str, Tensor], masks: Masks, bound: float) -> dict[str, Tensor]:
    """Return the flat indices of the kept scores up to ``bound``; NumPy is quick where few of many are true."""
    places = {}
    for name, score in scores.items():
        low = (score <= bound).logical_and_(masks[name]).reshape(-1)
        places[name] = torch.from_numpy(np.flatnonzero(low.cpu().numpy())).to(low.device)
    return places


@method(
    "synflow",
    title="SynFlow",
    source="init",
    start="init",
    options={"rounds": 100, "schedule": "exponential", "precision": "float64"},
    reference="tanaka2020pruning",
    family="initialisation",
    paper=True,
)
def find(moment: Moment) -> Found:
    """Remove the weights with the least flow, in many small rounds.

    Options: ``rounds``; ``schedule``, "exponential" or "linear"; ``precision``, "float64" or "float32".
    """
    options = moment.options
    choose(options["precision"], ("float64", "float32"), "precision")
    images, _ = moment.batch(1)
    model = linearize_(moment.model, getattr(torch, options["precision"]))
    masks = {name: mask.contiguous().clone() for name, mask in moment.masks.items()}
    masking.apply_(model, masks)
    weights = masking.prunable(model)
    left = masking.n_kept(masks)
    for n in schedule(left, moment.n_keep, options["rounds"], options["schedule"]):
        _, scores = flow(model, images.shape[1:])
        for name, places in drop_lowest_(scores, masks, left, left - n).items():
            weights[name].data.view(-1)[places] = 0
        left = n
    return Found(masks)
