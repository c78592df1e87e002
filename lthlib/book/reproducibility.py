"""What the chapters on reproducibility and on the verdict show: tables drawn from recorded results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from lthlib.book.markdown import origin, recorded, table
from lthlib.core.store import ROOT
from lthlib.results.evaluate import DIMENSIONS
from lthlib.results.recorded import RESULTS

RERUNS = ROOT / RESULTS / "reruns.json"  # by benchmarks/reruns.py
AGREEMENT = ROOT / RESULTS / "agreement.json"  # by benchmarks/agreement.py
POWER = ROOT / RESULTS / "power.json"  # by benchmarks/verdict.py
SYNFLOW = ROOT / RESULTS / "synflow-counts.json"  # by benchmarks/synflow_counts.py
KINDS = {"tickets": "networks trained", "job": "jobs run", "page": "pages"}
GIVEN = "measuring only"  # ends the name of a way that is given the reference's networks


def chapter_tables() -> dict[str, str]:
    """Return the tables that the chapters include, by file name, from what is recorded."""
    return {
        "reruns.md": recorded(RERUNS, reruns_table),
        "agreement.md": recorded(AGREEMENT, agreement_tables),
        "errors.md": recorded(POWER, errors_table),
        "synflow-counts.md": recorded(SYNFLOW, synflow_table),
    }


def errors_table(found: Mapping) -> str:
    """Return how often the verdict errs on made-up studies, as a table in Markdown."""
    lines = [
        {
            "seeds": f"{line['seeds']}",
            "tickets of a study": f"{line['rounds']}",
            "spread over trainings": f"{line['trainings']:g} tolerances" + ", unlike by ticket" * bool(line["unlike"]),
            "equal, and some metric is called lost": f"{100 * line['lost']:.1f} %",
            "worse by twice the tolerance, and a metric is called kept": f"{100 * line['kept']:.1f} %",
        }
        for line in found["errors"]
    ]
    made = f"{found['studies']:,} studies a line, a fifth of that for the last column. {origin(found['provenance'])}"
    return f"{table(lines)}\n\n{made}"


def synflow_table(found: Mapping) -> str:
    """Return what SynFlow's counts do to masks and accuracy, as a table in Markdown."""
    lines = [
        {
            "sparsity": f"{100 * line['sparsity']:.1f} %",
            "counts that differ, of 100": f"{line['counts']}",
            "overlap of the masks (Jaccard)": f"{line['overlap']:.2f}",
            "accuracy, published counts": f"{100 * line['published']:.2f} %",
            "accuracy, nearest counts": f"{100 * line['nearest']:.2f} %",
            "difference ± its standard error": f"{100 * line['difference']:+.2f} ± {100 * line['standard_error']:.2f}",
            "spread over seeds": f"{100 * line['over_seeds']:.2f}",
        }
        for line in found["lines"]
    ]
    made = f"MNIST-5k, ResNet-8, {found['seeds']} pairs of trainings a line, in percentage points of the test images."
    return f"{table(lines)}\n\n{made} {origin(found['provenance'])}"


def reruns_table(found: Mapping) -> str:
    """Return what is made again after each change, as a table in Markdown."""
    lines = [
        {
            "change": line["change"],
            **{f"{KINDS[k]} (of {len(found['every'][k])})": f"{len(line.get(k, ()))}" for k in KINDS},
            "the book": "again" if line.get("book") else "–",
        }
        for line in found["changes"]
    ]
    return f"{table(lines)}\n\n{origin(found['provenance'])}"


def deviation(value: pd.Series, other: pd.Series) -> pd.Series:
    """Return how far numbers are apart: the difference, divided by the larger of the two where that exceeds 1."""
    scale = pd.concat([value.abs(), other.abs()], axis=1).max(axis=1).clip(lower=1.0)
    return (value - other).abs() / scale


def agreement_tables(found: Mapping) -> str:
    """Return what is the same and how far the rest is apart, as two tables in Markdown."""
    lines = []
    for run in found["runs"]:
        made = {
            "networks": _of(run["networks"]),
            "masks found before training": _masks(run["masks_at_init"]),
            "masks found later": _masks(run["masks_trained"]),
        }
        if run["way"].endswith(GIVEN):
            made = dict.fromkeys(made, "given")
        rows = [sum(part[name] for part in run["dimensions"].values()) for name in ("same", "rows")]
        way = {"precision": run["precision"], "against one worker of one thread": run["way"]}
        lines.append({**way, **made, "rows": _of(rows)})
    return f"{table(lines)}\n\n{_tolerances(found)}\n\n{origin(found['provenance'])}"


def _tolerances(found: Mapping) -> str:
    runs = {f"{r['way']}, {r['precision']}": r["dimensions"] for r in found["runs"] if "threads" in r["way"]}
    runs |= {f"another seed, {precision}": of for precision, of in found["seeds"].items()}
    told = lambda part: f"{part['largest']:.1g} ({part['median']:.1g})"
    return table(
        {"dimension": dimension.title, **{way: told(of[name]) for way, of in runs.items()}}
        for name, dimension in DIMENSIONS.items()
    )


def _of(pair: Sequence[int]) -> str:
    same, every = pair
    return f"all {every:,}" if same == every else f"{same:,} of {every:,}"


def _masks(counts: Sequence[int]) -> str:
    same, every, differ, kept = counts
    return _of((same, every)) + (f"; {100 * differ / kept:.2g} % of the weights kept are others" if differ else "")
