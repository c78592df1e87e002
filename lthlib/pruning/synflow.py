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

What it costs. For one image, a pass does little but read the weights and write their gradients. dR/dw is the product
of two thin matrices, though: what enters a convolution, and dR by what leaves it. So it is never written: a `Slope`
keeps the factors and makes some rows at a time, which are compared while they are in the cache, and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, autograd, nn

from lthlib.core.errors import UserError, choose
from lthlib.pruning import Found, Moment, Option, method
from lthlib.pruning import masks as masking
from lthlib.pruning.masks import Masks

SCHEDULES = ("exponential", "linear")
SAMPLE = 1 << 13  # scores from which a round's bound is guessed
PIECE = 1 << 17  # scores made at a time: they fit in the cache


def linearize_(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Turn ``model`` into the network of absolute values, in evaluation mode and without normalisation."""
    model.to(dtype, memory_format=torch.contiguous_format).eval()
    if hasattr(model, "normalize"):
        model.normalize = nn.Identity()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.abs_()
    return model


@dataclass(frozen=True)
class Slope:
    """dR/dw of a convolution's weight, (out, fan-in), as a sum of products that are made when they are asked for.

    Attributes:
        uses: (entering, leaving) for each use of the layer: the patches it saw, (pixels, fan-in), and dR by what came
        out, (pixels, out).
    """

    uses: Sequence[tuple[Tensor, Tensor]]

    def rows(self, part: slice = slice(None)) -> Tensor:
        """Return dR/dw of some output channels, (rows, fan-in)."""
        return reduce(add, (leaving.T[part] @ entering for entering, leaving in self.uses))

    def at(self, places: Tensor) -> Tensor:
        """Return dR/dw at flat indices."""
        fan_in = self.uses[0][0].shape[1]
        rows, columns = places // fan_in, places % fan_in
        return reduce(add, ((leaving[:, rows] * entering[:, columns]).sum(0) for entering, leaving in self.uses))


def flow(model: nn.Module, image_shape: Sequence[int]) -> tuple[Tensor, dict[str, Slope]]:
    """Return R and dR/dw of every prunable weight of a network made by `linearize_`; w dR/dw is the score.

    Raises:
        UserError: Where R is not finite in the network's precision.
    """
    weights = masking.prunable(model)
    some = next(iter(weights.values()))
    with _by_patches(model) as uses:
        total = model(torch.ones(1, *image_shape, dtype=some.dtype, device=some.device)).sum()
    if not total.isfinite():
        raise _not_finite("this network", some.dtype)
    factored = {name: each for name, each in uses.items() if each and all(each)}
    whole = {name: weight for name, weight in weights.items() if name not in factored}
    products = [product for each in factored.values() for _, product in each]
    gradients = iter(autograd.grad(total, [*products, *whole.values()]))
    slopes = {name: Slope([(patches, next(gradients)) for patches, _ in each]) for name, each in factored.items()}
    for name in whole:
        gradient = next(gradients).flatten(1)
        slopes[name] = Slope([(gradient, torch.eye(len(gradient)).to(gradient))])
    return total.detach(), {name: slopes[name] for name in weights}


@contextmanager
def _by_patches(model: nn.Module) -> Iterator[dict[str, list[tuple[Tensor, Tensor] | None]]]:
    """Let the convolutions multiply patches and weights; yields, by weight, what `_multiply` remembers of each use.

    Grouped convolutions and those with an unusual padding stay as they are, and are not in what is yielded.
    """
    uses, changed = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or module.groups > 1 or isinstance(module.padding, str):
            continue
        if module.padding_mode == "zeros":
            each = uses.setdefault(f"{name}.weight" if name else "weight", [])
            module.forward = partial(_multiply, module, each)
            changed.append(module)
    try:
        yield uses
    finally:
        for module in changed:
            del module.forward


def _multiply(conv: nn.Conv2d, uses: list[tuple[Tensor, Tensor] | None], image: Tensor) -> Tensor:
    """Convolve one image, and remember the patches, (pixels, fan-in), and the product, (pixels, out).

    This is faster than torch's convolution where the weights are more than the patches; elsewhere, None is remembered.
    """
    height, width = _size(conv, image)
    if height * width > conv.out_channels:
        uses.append(None)
        return type(conv).forward(conv, image)
    patches = F.unfold(image, conv.kernel_size, conv.dilation, conv.padding, conv.stride)[0].T.contiguous()
    product = F.linear(patches, conv.weight.flatten(1), conv.bias)
    uses.append((patches.detach(), product))
    return product.T.view(1, -1, height, width)


def _size(conv: nn.Conv2d, image: Tensor) -> list[int]:
    """Return the height and width of a convolution's output."""
    return [
        (extent + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for extent, padding, dilation, kernel, stride in zip(
            image.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    ]


def _not_finite(what: str, dtype: torch.dtype) -> UserError:
    way = "use float64 (option precision)"
    if dtype == torch.float64:
        way = "look for infinite weights, scales or running statistics, or train with a lower learning rate"
    return UserError(f"The synaptic flow through {what} is not finite in {dtype}: {way}.")


def schedule(n_weights: int, n_keep: int, rounds: int, kind: str) -> list[int]:
    """Return how many weights stay after each of ``rounds`` rounds; the last is ``n_keep``."""
    choose(kind, SCHEDULES, "schedule")
    density = n_keep / n_weights
    steps = [k / rounds for k in range(1, rounds)]
    shares = [density**t if kind == "exponential" else 1 - (1 - density) * t for t in steps]
    return [max(n_keep, round(n_weights * share)) for share in shares] + [n_keep]


def drop_lowest_(
    weights: Mapping[str, Tensor], slopes: Mapping[str, Slope], masks: Masks, n_kept: int, n_drop: int
) -> dict[str, Tensor]:
    """Take the ``n_drop`` lowest of the scores kept out of ``masks``; return their flat indices by layer.

    As exact as `masks.keep_top` on weights * dR/dw, and with its rule for ties. But a round drops few, and has to
    cost little beside the pass before it: only scores below a bound guessed from a sample are looked at closely.

    Args:
        weights: Not negative, by layer.
        slopes: Not negative, by layer.
        masks: Changed in place.
        n_kept: How many they keep.
        n_drop: How many to drop.

    Raises:
        UserError: For a score that is not finite (names the layer).
    """
    found = _all_below(weights, slopes, masks, _guess_bound(weights, slopes, masks, n_drop / n_kept))
    if sum(len(places) for places, _ in found.values()) < n_drop:
        found = _all_below(weights, slopes, masks, np.inf)
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


def _guess_bound(weights: Mapping[str, Tensor], slopes: Mapping[str, Slope], masks: Masks, fraction: float) -> float:
    """Return a bound above about ``fraction`` of the scores kept and a margin, from a sample of them."""
    stride = max(1, sum(mask.numel() for mask in masks.values()) // SAMPLE)
    seen = []
    for name, mask in masks.items():
        places = torch.arange(0, mask.numel(), stride, device=mask.device)
        places = places[mask.view(-1)[places]]
        seen.append(weights[name].detach().view(-1)[places] * slopes[name].at(places))
    seen = torch.cat(seen)
    rank = len(seen) * fraction
    rank = int(rank + 8 * rank**0.5 + 8)  # generous: low scores come in clusters; a bound too low is only slow
    return seen.kthvalue(rank).values.item() if rank <= len(seen) else np.inf


def _all_below(
    weights: Mapping[str, Tensor], slopes: Mapping[str, Slope], masks: Masks, bound: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return what `_below` returns, by layer."""
    return {name: _below(name, weights[name], slopes[name], masks[name], bound) for name in masks}


def _below(name: str, weight: Tensor, slope: Slope, mask: Tensor, bound: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat indices of a layer's kept scores up to ``bound``, and these scores."""
    weight, mask = weight.detach().flatten(1), mask.flatten(1)
    n_rows = max(1, PIECE // weight.shape[1])
    places, scores = [], []
    for start in range(0, len(weight), n_rows):
        part = slice(start, start + n_rows)
        score = slope.rows(part).mul_(weight[part])
        if not score.max() < np.inf:
            raise _not_finite(f"layer {name!r}", weight.dtype)
        low = (score <= bound).logical_and_(mask[part]).view(-1).nonzero()[:, 0]
        places.append((low + start * weight.shape[1]).cpu().numpy())
        scores.append(score.view(-1)[low].cpu().numpy())
    return np.concatenate(places), np.concatenate(scores)


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
def find(moment: Moment) -> Found:
    """Remove the weights with the least flow, in many small rounds.

    Options: ``rounds``; ``schedule``, "exponential" or "linear"; ``precision``, "float64" or "float32".
    """
    options = moment.options
    images, _ = moment.batch(1)
    model = linearize_(moment.model, getattr(torch, options["precision"]))
    masks = {name: mask.contiguous().clone() for name, mask in moment.masks.items()}
    masking.apply_(model, masks)
    weights = masking.prunable(model)
    left = masking.n_kept(masks)
    for n in schedule(left, moment.n_keep, options["rounds"], options["schedule"]):
        _, slopes = flow(model, images.shape[1:])
        for name, places in drop_lowest_(weights, slopes, masks, left, left - n).items():
            weights[name].data.view(-1)[places] = 0
        left = n
    return Found(masks)
