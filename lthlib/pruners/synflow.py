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

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, autograd, nn

from lthlib import masks as masking
from lthlib.errors import UserError, choose
from lthlib.masks import Masks
from lthlib.pruners import Found, Moment, method

SAMPLE = 1 << 14  # scores from which a round's bound is guessed
PIECE = 1 << 16  # scores multiplied out at a time: they fit in a core's cache


def linearize_(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Turn ``model`` into the network of absolute values, in evaluation mode and without normalisation."""
    model.to(dtype, memory_format=torch.contiguous_format).eval()
    if hasattr(model, "normalize"):
        model.normalize = nn.Identity()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.abs_()
    return model


def flow(model: nn.Module, image_shape: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return R and dR/dw of every prunable weight of a network made by `linearize_`; w dR/dw is the score.

    Raises:
        UserError: Where R is not finite in the network's precision.
    """
    weights = masking.prunable(model)
    some = next(iter(weights.values()))
    total = model(torch.ones(1, *image_shape, dtype=some.dtype, device=some.device)).sum()
    if not total.isfinite():
        raise UserError(f"The synaptic flow through this network is not finite in {some.dtype}: use float64.")
    gradients = autograd.grad(total, list(weights.values()))
    return total.detach(), dict(zip(weights, gradients, strict=True))


def schedule(n_weights: int, n_keep: int, rounds: int, kind: str) -> list[int]:
    """Return how many weights stay after each of ``rounds`` rounds; the last is ``n_keep``."""
    choose(kind, ("exponential", "linear"), "schedule")
    density = n_keep / n_weights
    steps = [k / rounds for k in range(1, rounds)]
    shares = [density**t if kind == "exponential" else 1 - (1 - density) * t for t in steps]
    return [max(n_keep, round(n_weights * share)) for share in shares] + [n_keep]


def drop_lowest_(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], masks: Masks, n_kept: int, n_drop: int
) -> dict[str, Tensor]:
    """Take the ``n_drop`` lowest of the scores kept out of ``masks``; return their flat indices by layer.

    As exact as `masks.keep_top` on weights * gradients, and with its rule for ties. But a round drops few, and has
    to cost little beside the pass before it: scores are multiplied out piece by piece in the cache, never as a
    whole, and only those below a bound guessed from a sample are looked at closely.

    Args:
        weights: Not negative, by layer.
        gradients: Not negative, by layer.
        masks: Changed in place.
        n_kept: How many they keep.
        n_drop: How many to drop.

    Raises:
        UserError: For a score that is not finite (names the layer).
    """
    found = _all_below(weights, gradients, masks, _guess_bound(weights, gradients, masks, n_drop / n_kept))
    if sum(len(places) for places, _ in found.values()) < n_drop:
        found = _all_below(weights, gradients, masks, np.inf)
    goes = _lowest(np.concatenate([low for _, low in found.values()]), n_drop)
    ends = np.cumsum([len(places) for places, _ in found.values()])[:-1]
    dropped = {
        name: torch.from_numpy(places[part]).to(masks[name].device)
        for (name, (places, _)), part in zip(found.items(), np.split(goes, ends), strict=True)
    }
    for name, places in dropped.items():
        masks[name].view(-1)[places] = False
    return dropped


def _lowest(scores: np.ndarray, n: int) -> np.ndarray:
    """Mark the ``n`` lowest of a flat array; among equals the last."""
    if n == 0:
        return np.zeros(len(scores), dtype=bool)
    threshold = np.partition(scores, n - 1)[n - 1]
    goes = scores < threshold
    goes[np.flatnonzero(scores == threshold)[goes.sum() - n :]] = True
    return goes


def _guess_bound(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], masks: Masks, fraction: float
) -> float:
    """Return a bound above about ``fraction`` of the scores kept and a margin, from a sample of them."""
    stride = max(1, sum(mask.numel() for mask in masks.values()) // SAMPLE)
    sampled = (
        [t[name].detach().reshape(-1)[::stride] for t in (weights, gradients, masks)] for name in masks
    )
    seen = torch.cat([(weight * gradient)[mask] for weight, gradient, mask in sampled])
    rank = len(seen) * fraction
    rank = int(
        rank + 8 * rank**0.5 + 8
    )  # generous: low scores come in clusters; a bound too low is only slow
    return seen.kthvalue(rank).values.item() if rank <= len(seen) else np.inf


def _all_below(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], masks: Masks, bound: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return what `_below` returns, by layer; layers are shared out among as many threads as torch uses."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = pool.map(lambda name: _below(name, weights[name], gradients[name], masks[name], bound), masks)
        return dict(zip(masks, found, strict=True))


def _below(
    name: str, weight: Tensor, gradient: Tensor, mask: Tensor, bound: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat indices of a layer's kept scores up to ``bound``, and these scores."""
    w, g, kept = (t.detach().reshape(-1).cpu().numpy() for t in (weight, gradient, mask))
    places, scores = [], []
    piece = np.empty(min(len(w), PIECE), dtype=w.dtype)
    for start in range(0, len(w), PIECE):
        part = slice(start, start + PIECE)
        score = np.multiply(w[part], g[part], out=piece[: len(w) - start])
        if not score.max() < np.inf:
            raise UserError(
                f"The synaptic flow through layer {name!r} is not finite in {w.dtype}: use float64."
            )
        low = np.flatnonzero((score <= bound) & kept[part])
        places.append(low + start)
        scores.append(score[low])
    return np.concatenate(places), np.concatenate(scores)


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
        _, gradients = flow(model, images.shape[1:])
        for name, places in drop_lowest_(weights, gradients, masks, left, left - n).items():
            weights[name].data.view(-1)[places] = 0
        left = n
        del gradients  # as large as the network: to be used again by the next pass
    return Found(masks)
