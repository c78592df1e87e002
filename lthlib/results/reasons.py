"""Why RigL is less flat, where it is: which reasons a study's rows leave, as sentences that its differences select."""

# ruff: noqa: E501  # sentences, one a line

from __future__ import annotations

from collections.abc import Sequence

from lthlib.pruning import METHODS
from lthlib.results.claims_parts import CANNOT, FAILS, HOLDS, UNMEASURED, Evidence, Part, ahead

TRACE, PIXELS, SCALE_FREE, ACCURACY = (
    "weight_hessian_trace",
    "input_hessian_trace",
    "relative_flatness",
    "test_accuracy",
)
FACTS = {  # what it means that the other methods are shown ahead of RigL, behind it, or neither
    TRACE: {
        HOLDS: "RigL is less flat in its weights than the other methods at the same sparsity.",
        FAILS: "RigL is the flatter one in its weights here, so there is nothing to explain.",
        CANNOT: "RigL is not shown to be less flat in its weights here, so there may be nothing to explain.",
    },
    SCALE_FREE: {
        HOLDS: "In relative flatness, which rescaling a layer does not change, it is behind as well.",
        FAILS: "In relative flatness, which rescaling a layer does not change, it is ahead.",
        CANNOT: "In relative flatness, which rescaling a layer does not change, no difference is shown.",
    },
    PIXELS: {
        HOLDS: "In the pixels it is less flat, too.",
        FAILS: "In the pixels it is the flatter one.",
        CANNOT: "In the pixels no difference is shown.",
    },
    ACCURACY: {
        HOLDS: "It is less accurate.",
        FAILS: "It is more accurate.",
        CANNOT: "In accuracy no difference is shown.",
    },
}
COUNT = "All have equally many weights at a sparsity, so that their number is no reason."
SCALE = "The scale of its weights may be one: a layer with smaller weights has a larger trace, whatever the network answers."
NO_SCALE = "The scale of its weights does not explain it."
DOUBT = "Doubt may be one, too: a network that fits less is less sure, and every curvature falls as it becomes sure."
NO_DOUBT = "Doubt, which would raise every curvature, is hardly one."
NOT_ALONE = "But doubt alone would raise the curvature in the pixels as well."


def why_less_flat(e: Evidence) -> tuple[str, Sequence[Part]]:
    """Return sentences, and the differences that selected them; empty where flatness of RigL was not measured.

    The others are the unstructured methods whose masks stand still, but for GraSP, of which the same is claimed.
    """
    families = ("random", "magnitude", "initialisation")
    others = [name for name, m in METHODS.items() if m.family in families and name != "grasp"]
    per_weight = f"{TRACE}_per_weight"
    found = {m: ahead(e, m, e.measured(others, m), ["rigl"]) for m in (TRACE, per_weight, SCALE_FREE, PIXELS, ACCURACY)}
    if found[TRACE].outcome == UNMEASURED:
        return "", ()
    told = {m: part for m, part in found.items() if part.outcome != UNMEASURED}
    said = [FACTS[m][part.outcome] for m, part in told.items() if m in FACTS]
    if found[TRACE].outcome == HOLDS:
        scale, doubt = found[SCALE_FREE].outcome, found[ACCURACY].outcome
        said += [COUNT, *{HOLDS: [NO_SCALE], FAILS: [SCALE], CANNOT: [SCALE]}.get(scale, [])]
        said += {HOLDS: [DOUBT], FAILS: [NO_DOUBT]}.get(doubt, [])
        said += [NOT_ALONE] * (doubt == HOLDS and found[PIXELS].outcome == FAILS)
    return " ".join(said), list(told.values())
