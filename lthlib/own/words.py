"""A verdict on networks of your own in words, as text for a terminal and as JSON for machines."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import pandas as pd

from lthlib.metrics import METRICS
from lthlib.own.compare import Comparison
from lthlib.results import verdict


class Conclusion(NamedTuple):
    """What is found of a pruned network: of all metrics together, in a sentence, and of each that counts."""

    outcome: str
    sentence: str
    sparsity: float
    votes: pd.DataFrame


def conclusion(found: Comparison, name: str) -> Conclusion:
    """Say whether a network keeps what its parent has, and whom that is about.

    What was asked for and could not be measured is not shown. The votes are lines of `lthlib.results.verdict.judge`,
    with a ``title`` each, and what would decide it as ``decides``.
    """
    judged = found.judged[found.judged["method"] == name]
    (passed,) = verdict.lth_pass(judged).itertuples()
    votes = verdict.votes(judged)
    votes = votes[votes["outcome"] != ""].drop_duplicates(verdict.CASE)  # accuracy belongs to every dimension
    titles = [METRICS[line.metric].title + f" ({line.shift})" * (line.shift != "none") for line in votes.itertuples()]
    votes = votes.assign(title=titles, decides=[verdict.what_would_decide(line) for line in votes.to_dict("records")])
    outcome = verdict.NOT_SHOWN if found.failed and passed.outcome == verdict.KEPT else passed.outcome
    said = {
        verdict.KEPT: "LTH-PASS: it keeps everything that was measured.",
        verdict.NOT_SHOWN: "It loses nothing for certain, and is not shown to keep the rest.",
    }.get(outcome, f"It does not keep: {', '.join(METRICS[metric].title for metric in passed.lost)}.")
    if found.failed:
        said += f" Nothing is shown of {' and '.join(found.failed)}, which could not be measured."
    if scope := next(filter(None, votes["scope"]), ""):
        said += f" This is about {scope}."
    return Conclusion(outcome, f"{passed.kept} of {passed.of} kept. {said}", passed.sparsity, votes)


def status(found: Comparison) -> int:
    """Return the exit status that a verdict is worth: 0 all kept, 2 something lost, 3 something not shown."""
    outcomes = {conclusion(found, name).outcome for name in found.pruned}
    return 2 if outcomes & {verdict.LOST, verdict.COLLAPSED} else 3 if verdict.NOT_SHOWN in outcomes else 0


def summary(found: Comparison, name: str) -> str:
    """Return what is to be said of one pruned network, as text: every metric with a vote, and the verdict."""
    _, sentence, sparsity, votes = conclusion(found, name)
    known = not math.isnan(sparsity)
    share = f"{100 * sparsity:.1f} % of the prunable weights are zero or gone" if known else "weights cannot be read"
    lines = [f"{name}: {share}", ""]
    lines.append(f"{'':<44}{'dense':>10}{'pruned':>10}{'worse by':>10}{'at most':>10}{'tolerated':>11}")
    for line in votes.to_dict("records"):
        numbers = "".join(f" {line[key]:>9.4g}" for key in ("dense", "mean", "shortfall", "most"))
        arrow = METRICS[line["metric"]].arrow
        lines.append(f"{arrow} {line['title'][:41]:<42}{numbers}{line['allowed']:>11.4g}  {line['outcome']}")
    if open_ := [f"  {line.title}: {line.decides}" for line in votes.itertuples() if line.decides]:
        lines += ["", "What would decide what is not shown:", *open_]
    return "\n".join([*lines, "", sentence])


def as_json(found: Comparison) -> dict[str, object]:
    """Return verdicts, numbers and circumstances as JSON can hold them; what is not a number is null."""
    networks = {}
    numbers = ["dense", "pruned", "shortfall", "least", "most", "allowed"]
    for name in found.pruned:
        outcome, sentence, sparsity, votes = conclusion(found, name)
        kept = votes.rename(columns={"mean": "pruned"})
        kept = kept[["dimension", "metric", "shift", *numbers, "outcome", "decides"]]
        networks[name] = {
            "outcome": outcome,
            "verdict": sentence,
            "sparsity": None if math.isnan(sparsity) else sparsity,
            "metrics": json.loads(kept.to_json(orient="records")),
        }
    return {"status": status(found), "networks": networks, **found.facts}
