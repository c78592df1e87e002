"""Small dense: no weight is removed, the network is built narrower with the same depth.

Every channel group is scaled by one multiplier, found so that the number of prunable weights is as near as possible to
what the sparse networks keep. The claim that "sparse beats small dense at equal parameters" is tested against it. The
paper set widths by hand for one sparsity; this is defined at every sparsity and for every architecture.

Whole channels come in steps, so the budget is met nearly, not exactly; the cost columns have the true count.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction

from torch import nn

from lthlib.core.errors import UserError
from lthlib.networks import all_groups, convolution_cost
from lthlib.pruning.registry import Found, Moment, method


def scale(groups: Mapping[str, int], multiplier: Fraction) -> dict[str, int]:
    """Return the widths times ``multiplier``, rounded (halves up), at least 1."""
    return {name: max(1, int(width * multiplier + Fraction(1, 2))) for name, width in groups.items()}


def fit_widths(model: nn.Module, n_keep: int) -> dict[str, int]:
    """Return the uniformly scaled widths with the number of convolution weights nearest to ``n_keep``.

    Exact: widths change only at multipliers (j + 1/2) / width, and the count rises with the multiplier, so the two
    neighbours of ``n_keep`` are found by bisection over these. `UserError` where one channel in each group has more.
    """
    groups, cost = all_groups(model), convolution_cost(model)
    widths = set(groups.values())
    steps = sorted({Fraction(2 * j - 1, 2 * width) for width in widths for j in range(1, width + 1)})
    place = bisect_right(steps, n_keep, key=lambda multiplier: cost(scale(groups, multiplier)))
    if place == 0:
        raise UserError(
            f"No uniformly scaled network has {n_keep} convolution weights or fewer: with one channel in "
            f"each group there are {cost(scale(groups, steps[0]))}. Choose a lower sparsity."
        )
    near = [scale(groups, multiplier) for multiplier in steps[place - 1 : place + 1]]
    return min(near, key=lambda channels: abs(cost(channels) - n_keep))


@method(
    "small-dense", title="Small dense", source="init", start="init", reference="liu2019rethinking", family="structured"
)
def small_dense(moment: Moment) -> Found:
    """Scale the widths of the architecture to the budget."""
    return Found(channels=fit_widths(moment.model, moment.n_keep))
