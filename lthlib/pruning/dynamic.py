"""RigL (Evci et al. 2020) and SET (Mocanu et al. 2018): sparse networks that move their weights while they train.

Both start from random masks, by default with Erdos-Renyi-kernel densities. Every ``delta_t`` steps, each layer drops
its smallest ``|w|`` and grows as many weights elsewhere; counts by layer never change, and a new weight starts at 0,
with its momentum at 0.

*RigL* grows the places with the largest ``|dL/dw|``. The gradient is that of *all* weights at the sparse network, so an
absent weight can show what it would do. The fraction that moves falls as a cosine, alpha_t = alpha / 2 (1 + cos(pi t /
t_end)), and is 0 from t_end on. As published in code: a weight just dropped may grow again at once, and then keeps its
value and momentum; a step that moves weights does nothing else, the optimizer's step is skipped. Both are options.

*SET* grows at random places that were not kept before, a constant fraction throughout, and takes the optimizer's step
as usual. No gradient of an absent weight is needed; the price is a search without direction.

No update at step 0: nothing is learned yet that could be ranked. Known pitfalls: gradients of masked weights, which are
0 where growth looks (the commonest error of ports); growth at random counts, so that the density drifts; ``delta_t`` in
epochs. Equal magnitudes are told apart by index, not by noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lthlib.pruning import masks as masking
from lthlib.pruning.densities import erk_counts, uniform_counts
from lthlib.pruning.masks import Masks
from lthlib.pruning.random import random_scores
from lthlib.pruning.registry import Found, Moment, Option, method

DISTRIBUTION = Option("erk", choices=("erk", "uniform"))


def drop_fraction(step: int, end: int, alpha: float) -> float:
    """Return the fraction of a layer's weights that moves: a cosine from ``alpha`` at 0 to 0 at ``end``."""
    return alpha / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0


def move(
    mask: Tensor, magnitude: Tensor, growth: Tensor, n_move: int, *, regrow_dropped: bool
) -> tuple[Tensor, Tensor]:
    """Drop the ``n_move`` lowest magnitudes of one layer and grow as many of the highest ``growth``, all of one shape.

    Fewer move where there are fewer places to go. ``regrow_dropped``: whether a weight just dropped may grow again.

    Returns:
        The new mask, with the old one's count, and the places that were not kept before.
    """
    if not regrow_dropped:
        n_move = min(n_move, int((~mask).sum()))
    survivors = _top(magnitude, int(mask.sum()) - n_move, mask)
    grown = _top(growth, n_move, ~(survivors if regrow_dropped else mask))
    new = survivors | grown
    return new, new & ~mask


def _top(score: Tensor, n: int, within: Tensor) -> Tensor:
    return masking.keep_top({"": score}, n, within={"": within})[""]


def place_(weight: nn.Parameter, mask: Tensor, new: Tensor, optimizer: Optimizer) -> None:
    """Set pruned and new weights to 0, and with them what the optimizer remembers of them (its momentum)."""
    fresh = new | ~mask
    with torch.no_grad():
        weight.masked_fill_(fresh, 0.0)
        for value in optimizer.state.get(weight, {}).values():
            if torch.is_tensor(value) and value.shape == weight.shape:
                value.masked_fill_(fresh, 0.0)


@dataclass(frozen=True)
class RigL:
    """The `Dynamics` of RigL; nothing in it is random."""

    options: Mapping[str, object]
    total_steps: int
    n_keep: int
    seed: int

    def update(self, step: int, model: nn.Module, masks: Masks, optimizer: Optimizer) -> bool:
        """Move weights if it is time to."""
        end = int(self.options["end_fraction"] * self.total_steps)
        if step == 0 or step % self.options["delta_t"] or step >= end:
            return False
        weights = masking.weights_of(model, masks)
        masks.update({name: mask.to(weights[name].device) for name, mask in masks.items()})  # they come on the CPU
        fraction, growth = self._fraction(step, end), self._growth(step, weights)
        regrow_dropped = self.options.get("regrow_dropped", False)
        for name, weight in weights.items():
            n_move = int(fraction * int(masks[name].sum()))
            masks[name], new = move(
                masks[name], weight.detach().abs(), growth[name], n_move, regrow_dropped=regrow_dropped
            )
            place_(weight, masks[name], new, optimizer)
        return self.options.get("skip_step", False)

    def _fraction(self, step: int, end: int) -> float:
        return drop_fraction(step, end, self.options["alpha"])

    def _growth(self, step: int, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return {name: weight.grad.abs() for name, weight in weights.items()}


class Evolution(RigL):
    """The `Dynamics` of SET; what grows at a step depends on seed and step alone: runs can be resumed."""

    def _fraction(self, step: int, end: int) -> float:
        return self.options["fraction"]

    def _growth(self, step: int, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        # One seed for the pair: torch's generator looks at the low 32 bits of a seed alone.
        seed = int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in weights.items()}


def sparse_start(moment: Moment) -> Found:
    """Return random masks with the densities that option ``distribution`` asks for, "erk" or "uniform".

    As published, the uniform distribution leaves the first layer dense.
    """
    shapes = {name: mask.shape for name, mask in moment.masks.items()}
    if moment.options["distribution"] == "erk":
        counts = erk_counts(shapes, moment.n_keep)
    else:
        counts = uniform_counts(shapes, moment.n_keep, full=[next(iter(shapes))])
    return Found(random_scores(moment), counts)


@method(
    "rigl",
    title="RigL",
    source="init",
    start="init",
    during=RigL,
    options={
        "alpha": Option(0.3, above=0, most=1),
        "delta_t": Option(100, least=1),
        "end_fraction": Option(0.75, above=0, most=1),
        "distribution": DISTRIBUTION,
        "regrow_dropped": True,
        "skip_step": True,
    },
    reference="evci2020rigging",
    family="dynamic",
    paper=True,
)
def rigl(moment: Moment) -> Found:
    """Start from random masks; again and again drop the smallest weights and grow those of the largest gradients.

    Options: ``alpha``, the fraction that moves at first; ``delta_t``, steps between moves; ``end_fraction`` of the
    training after which masks stand still; ``distribution`` of the start; ``regrow_dropped``; ``skip_step``.
    """
    return sparse_start(moment)


@method(
    "set",
    title="SET",
    source="init",
    start="init",
    during=Evolution,
    options={
        "fraction": Option(0.3, above=0, most=1),
        "delta_t": Option(100, least=1),
        "end_fraction": Option(1.0, above=0, most=1),
        "distribution": DISTRIBUTION,
    },
    reference="mocanu2018scalable",
    family="dynamic",
)
def evolution(moment: Moment) -> Found:
    """Start from random masks; again and again drop the smallest weights and grow as many at random places.

    Options: ``fraction`` of a layer's weights that moves; ``delta_t``, steps between moves (published: one epoch);
    ``end_fraction`` of the training after which masks stand still; ``distribution`` of the start, "erk" or "uniform".
    """
    return sparse_start(moment)
