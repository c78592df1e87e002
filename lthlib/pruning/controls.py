"""Controls: tickets that keep one property of an LTH ticket and lose another.

* ``lth-shuffled`` keeps how many weights each layer has, and draws their places anew. Where it does as well as LTH, the
  densities by layer are what the method found (Frankle et al. 2021; Su et al. 2020).
* ``lth-reinit`` keeps the mask, and starts from initial weights of another seed. Where it does as well as LTH, the
  weights of the rewind point were no winning ticket, the structure was.
"""

from lthlib.pruning import masks as masking
from lthlib.pruning.registry import Found, Moment, method


@method(
    "lth-shuffled",
    title="LTH, shuffled in layers",
    source="lth",
    start="rewind",
    reference="frankle2021pruning",
    family="control",
)
def shuffled(moment: Moment) -> Found:
    """Keep the layers' densities, draw the places."""
    return Found(masks=masking.shuffle_within_layers(moment.masks, moment.seed))


@method(
    "lth-reinit",
    title="LTH, re-initialised",
    source="lth",
    start="reinit",
    reference="frankle2019lottery",
    family="control",
)
def reinitialised(moment: Moment) -> Found:
    """Keep the mask; the initial weights are drawn anew."""
    return Found(masks={name: mask.clone() for name, mask in moment.masks.items()})
