"""The dense network, nothing removed: the line that every other method is measured against; and a control of it.

``dense-long`` removes nothing either, and trains for as many epochs as the LTH ticket of its round has behind it: those
of the dense network at the beginning, of each round since, and its own. Where it does as well as LTH, the ticket owes
its accuracy to training. At its round it stands beside that ticket, though it has all the weights.
"""

from lthlib.pruning.registry import Found, Moment, method


@method("dense", title="Dense", source="init", start="init", reference="he2016deep", family="dense")
def dense(moment: Moment) -> Found:
    """Remove nothing."""
    return Found()


@method(
    "dense-long",
    title="Dense, as long as LTH",
    source="init",
    start="init",
    reference="renda2020comparing",
    family="dense",
    trained_like="lth",
)
def dense_long(moment: Moment) -> Found:
    """Remove nothing."""
    return Found()
