"""Random pruning in its three meanings, which differ much and are often confused.

* ``rp``: one uniform draw over all weights of the network, as in the paper. Each layer has density d in
  expectation, and small layers fluctuate around it.
* ``rp-layerwise``: the same density d in each layer, up to rounding.
* ``rp-erk``: density proportional to (out + in + height + width) / (out * in * height * width), so that small
  layers stay denser (Evci et al. 2020). It is much stronger than the others at high sparsity (Liu et al.
  2022).

In all three each weight has one fixed random rank per seed, so the weights of round n + 1 are among those of
round n. A fresh draw per sparsity would be another baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lthlib.pruning import Found, Moment, method
from lthlib.pruning import masks as masking


def random_scores(moment: Moment) -> dict[str, Tensor]:
    """Return one uniform number per prunable weight; depends on the shapes and the seed alone.

    Drawn in float64: float32 has 2^24 values only, hence ties in a network with more weights.
    """
    generator = torch.Generator().manual_seed(moment.seed)
    return {
        name: torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        for name, weight in masking.prunable(moment.model).items()
    }


def _shapes(moment: Moment) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in masking.prunable(moment.model).items()}


@method("rp", title="RP", source="init", start="rewind", reference="chen2022can", family="random", paper=True)
def find_global(moment: Moment) -> Found:
    """Keep a uniform random choice from all weights."""
    return Found(masking.keep_top(random_scores(moment), moment.n_keep))


@method(
    "rp-layerwise",
    title="RP (layer-wise)",
    source="init",
    start="rewind",
    reference="liu2022unreasonable",
    family="random",
)
def find_layerwise(moment: Moment) -> Found:
    """Keep a uniform random choice from each layer, at one density."""
    counts = masking.uniform_counts(_shapes(moment), moment.n_keep)
    return Found(masking.keep_top_per_layer(random_scores(moment), counts))


@method("rp-erk", title="RP (ERK)", source="init", start="rewind", reference="evci2020rigging", family="random")
def find_erk(moment: Moment) -> Found:
    """Keep a uniform random choice from each layer, at Erdos-Renyi-kernel densities."""
    counts = masking.erk_counts(_shapes(moment), moment.n_keep)
    return Found(masking.keep_top_per_layer(random_scores(moment), counts))
