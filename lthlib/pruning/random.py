"""Random pruning in its three meanings, which differ much and are often confused.

* ``rp``: one uniform draw over all weights of the network, as in the paper. Each layer has density d in expectation,
  and small layers fluctuate around it.
* ``rp-layerwise``: the same density d in each layer, up to rounding.
* ``rp-erk``: density proportional to (out + in + height + width) / (out * in * height * width), so that small layers
  stay denser (Evci et al. 2020). It is much stronger than the others at high sparsity (Liu et al. 2022).

In all three each weight has one fixed random rank per seed, so the weights of round n + 1 are among those of round n. A
fresh draw per sparsity would be another baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lthlib.pruning.densities import erk_counts, uniform_counts
from lthlib.pruning.registry import Found, Moment, method


def random_scores(moment: Moment) -> dict[str, Tensor]:
    """Return one uniform number per prunable weight; depends on the shapes and the seed alone.

    Drawn in float64: float32 has 2^24 values only, hence ties in a network with more weights.
    """
    generator = torch.Generator().manual_seed(moment.seed)
    return {
        name: torch.rand(mask.shape, generator=generator, dtype=torch.float64).to(mask.device)
        for name, mask in moment.masks.items()
    }


@method("rp", title="RP", source="init", start="rewind", reference="chen2022can", family="random", paper=True)
def rp(moment: Moment) -> Found:
    """Keep a uniform random choice from all weights."""
    return Found(random_scores(moment))


@method(
    "rp-layerwise",
    title="RP (layer-wise)",
    source="init",
    start="rewind",
    reference="liu2022unreasonable",
    family="random",
)
def rp_layerwise(moment: Moment) -> Found:
    """Keep a uniform random choice from each layer, at one density."""
    shapes = {name: mask.shape for name, mask in moment.masks.items()}
    return Found(random_scores(moment), uniform_counts(shapes, moment.n_keep))


@method("rp-erk", title="RP (ERK)", source="init", start="rewind", reference="evci2020rigging", family="random")
def rp_erk(moment: Moment) -> Found:
    """Keep a uniform random choice from each layer, at Erdos-Renyi-kernel densities."""
    shapes = {name: mask.shape for name, mask in moment.masks.items()}
    return Found(random_scores(moment), erk_counts(shapes, moment.n_keep))
