"""SET: sparse evolutionary training (Mocanu et al. 2018), the method from which RigL comes.

Every ``delta_t`` steps each layer drops its smallest |w| and grows as many weights at random places that were
not kept before. The fraction stays the same throughout, and the optimizer's step is taken as usual. No
gradient of an absent weight is needed, so the backward pass may be sparse too; the price is a search without
direction. Growth is exact in number, unlike Bernoulli growth, under which the density drifts. What differs
from RigL here is growth and schedule only: start, counts by layer and the resetting of new weights are shared, so
the two can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from lthlib.pruning import Found, Moment, Option, method
from lthlib.pruning import masks as masking
from lthlib.pruning.masks import Masks
from lthlib.pruning.rigl import DISTRIBUTIONS, move, place_, sparse_start


@dataclass(frozen=True)
class Evolution:
    """The `Dynamics` of SET; what grows at a step depends on seed and step alone: runs can be resumed."""

    fraction: float
    delta_t: int
    end: int
    seed: int

    def update(self, step: int, model: nn.Module, masks: Masks, optimizer: Optimizer) -> bool:
        """Move weights if it is time to; never skips the optimizer's step."""
        if step == 0 or step % self.delta_t or step >= self.end:
            return False
        generator = torch.Generator().manual_seed(_mix(self.seed, step))
        for name, weight in masking.prunable(model).items():
            growth = torch.rand(weight.shape, generator=generator).to(weight.device)
            n_move = int(self.fraction * int(masks[name].sum()))
            magnitude = weight.detach().abs()
            masks[name], new = move(masks[name], magnitude, growth, n_move, regrow_dropped=False)
            place_(weight, masks[name], new, optimizer)
        return False


def _mix(seed: int, step: int) -> int:
    """Return one seed for the pair; torch's generator looks at the low 32 bits of a seed alone."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def dynamics(options: Mapping[str, object], total_steps: int, n_keep: int, seed: int) -> Evolution:
    """Make the dynamics of one training of ``total_steps``."""
    end = int(options["end_fraction"] * total_steps)
    return Evolution(options["fraction"], options["delta_t"], end, seed)


@method(
    "set",
    title="SET",
    source="init",
    start="init",
    during=dynamics,
    options={
        "fraction": Option(0.3, above=0, most=1),
        "delta_t": Option(100, least=1),
        "end_fraction": Option(1.0, above=0, most=1),
        "distribution": Option("erk", choices=DISTRIBUTIONS),
    },
    reference="mocanu2018scalable",
    family="dynamic",
)
def find(moment: Moment) -> Found:
    """Start from random masks; again and again drop the smallest weights and grow as many at random places.

    Options: ``fraction`` of a layer's weights that moves; ``delta_t``, steps between moves (published: one
    epoch); ``end_fraction`` of the training after which masks stand still; ``distribution`` of the start,
    "erk" or "uniform".
    """
    return Found(sparse_start(moment))
