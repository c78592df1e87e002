"""What the paper and its summary claim, in the paper's order, and what studies say of it."""

from __future__ import annotations

from collections.abc import Sequence

from lthlib.results import claims_generalization, claims_others  # noqa: F401  # which fill CLAIMS, in this order
from lthlib.results.claims_parts import ALONE, CLAIMS, UNMEASURED, WIDTHS, Claim, Evidence, Finding

__all__ = ["ALONE", "CLAIMS", "Claim", "Finding", "find_all", "interpreted"]


def find_all(claim: Claim, studies: Sequence[Evidence]) -> dict[str, Finding]:
    """Judge a claim in each study, by its label; one about several in the two ends of each group of comparable ones."""
    if claim.over == ALONE:
        return {e.label: claim.find(e) for e in studies}
    size = lambda e: e.arch[1] if claim.over == WIDTHS else e.n_classes
    found = {}
    for e in studies:
        group = sorted((other for other in studies if _comparable(claim.over, e, other)), key=size)
        ends = group[0], group[-1]
        found[e.label] = claim.find(*ends) if size(ends[0]) < size(ends[1]) else Finding(UNMEASURED)
    return found


def _comparable(over: str, one: Evidence, other: Evidence) -> bool:
    if one.grid != other.grid:  # which may differ in recipe and number of training images, too
        return False
    alike = set(one.rows["dataset"]) == set(other.rows["dataset"])
    if over == WIDTHS:
        return alike and one.arch[0] == other.arch[0]
    return one.arch == other.arch and (one is other or not alike)


def interpreted(claim: Claim, finding: Finding) -> str:
    """Return what a finding means in words: the claim's sentences, then what the rule has to add."""
    if finding.outcome == UNMEASURED:
        return f"Not measured here: the rule needs {claim.needs}."
    text = claim.says[finding.outcome]
    if any(part.seeds == 1 for part in finding.parts):
        text += " There is one seed, so that nothing is known of other trainings."
    return f"{text} {finding.more}".strip()
