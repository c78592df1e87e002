"""The dense network: nothing is removed. The line that every other method is measured against."""

from lthlib.pruning.registry import Found, Moment, method


@method("dense", title="Dense", source="init", start="init", reference="he2016deep", family="dense")
def dense(moment: Moment) -> Found:
    """Remove nothing."""
    return Found()
