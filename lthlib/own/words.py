"""A verdict on networks of your own in words, as text for a terminal and as JSON for machines."""

from __future__ import annotations

import json

import pandas as pd

from lthlib.metrics import METRICS
from lthlib.own.compare import Comparison
from lthlib.results import verdict

NUMBERS = ("dense", "mean", "shortfall", "least", "most", "allowed")


def outcome(found: Comparison, name: str) -> str:
    """Return the outcome of all metrics together; what was asked for and could not be measured is not shown."""
    (passed,) = verdict.lth_pass(found.judged[found.judged["method"] == name]).itertuples()
    return verdict.NOT_SHOWN if found.failed and passed.outcome == verdict.KEPT else passed.outcome


def status(found: Comparison) -> int:
    """Return the exit status that a verdict is worth: 0 all kept, 2 something lost, 3 something not shown."""
    outcomes = {outcome(found, name) for name in list(found.networks)[1:]}
    return 2 if outcomes & {verdict.LOST, verdict.COLLAPSED} else 3 if verdict.NOT_SHOWN in outcomes else 0


def votes_of(judged: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the lines of one network that count for its verdict, with the ``title`` of each."""
    mine = judged[judged["method"] == name]
    mine = mine[mine["metric"].map(lambda metric: METRICS[metric].in_verdict) & (mine["outcome"] != "")]
    mine = mine.drop_duplicates(["metric", "shift", "severity"])  # accuracy belongs to every dimension
    titles = [
        METRICS[line.metric].title + ("" if line.shift == "none" else f" ({line.shift})") for line in mine.itertuples()
    ]
    return mine.assign(title=titles, decides=[verdict.what_would_decide(line) for line in mine.to_dict("records")])


def sentence(found: Comparison, name: str) -> str:
    """Say whether a network keeps what its parent has, and whom that is about."""
    judged = found.judged
    (passed,) = verdict.lth_pass(judged[judged["method"] == name]).itertuples()
    lost = ", ".join(METRICS[metric].title for metric in passed.lost)
    said = {
        verdict.KEPT: "LTH-PASS: it keeps everything that was measured.",
        verdict.NOT_SHOWN: "It loses nothing for certain, and is not shown to keep the rest.",
    }.get(outcome(found, name), f"It does not keep: {lost}.")
    scope = next((scope for scope in votes_of(judged, name)["scope"] if scope), "")
    if found.failed:
        said += f" Nothing is shown of {' and '.join(found.failed)}, which could not be measured."
    return f"{passed.kept} of {passed.of} kept. {said}" + (f" This is about {scope}." if scope else "")


def summary(found: Comparison, name: str) -> str:
    """Return what is to be said of one pruned network, as text: every metric with a vote, and the verdict."""
    votes = votes_of(found.judged, name)
    lines = [f"{name}: {100 * votes['sparsity'].iloc[0]:.1f} % of the prunable weights are zero or gone", ""]
    lines.append(f"{'':<44}{'dense':>10}{'pruned':>10}{'worse by':>10}{'at most':>10}{'tolerated':>11}")
    for line in votes.to_dict("records"):
        numbers = "".join(f" {line[key]:>9.4g}" for key in ("dense", "mean", "shortfall", "most"))
        arrow = METRICS[line["metric"]].arrow
        lines.append(f"{arrow} {line['title'][:41]:<42}{numbers}{line['allowed']:>11.4g}  {line['outcome']}")
    if open_ := [f"  {line.title}: {line.decides}" for line in votes.itertuples() if line.decides]:
        lines += ["", "What would decide what is not shown:", *open_]
    return "\n".join([*lines, "", sentence(found, name)])


def as_json(found: Comparison) -> dict[str, object]:
    """Return verdicts, numbers and circumstances as JSON can hold them; what is not a number is null."""
    networks = {}
    for name in list(found.networks)[1:]:
        votes = votes_of(found.judged, name).rename(columns={"mean": "pruned"})
        numbers = ["pruned" if key == "mean" else key for key in NUMBERS]
        kept = votes[["dimension", "metric", "shift", *numbers, "outcome", "decides"]]
        (passed,) = verdict.lth_pass(found.judged[found.judged["method"] == name]).itertuples()
        networks[name] = {
            "outcome": outcome(found, name),
            "verdict": sentence(found, name),
            "sparsity": passed.sparsity if passed.sparsity == passed.sparsity else None,
            "metrics": json.loads(kept.to_json(orient="records")),
        }
    return {"status": status(found), "networks": networks, **found.facts}
