"""What the chapters on reproducibility and on the verdict show: tables drawn from recorded results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from lthlib.core.store import ROOT
from lthlib.results.evaluate import DIMENSIONS
from lthlib.results.recorded import recorded_json

RERUNS = ROOT / "book" / "results" / "reruns.json"  # by benchmarks/reruns.py
AGREEMENT = ROOT / "book" / "results" / "agreement.json"  # by benchmarks/agreement.py
POWER = ROOT / "book" / "results" / "power.json"  # by benchmarks/verdict.py
SYNFLOW = ROOT / "book" / "results" / "synflow-counts.json"  # by benchmarks/synflow_counts.py
KINDS = {"tickets": "networks trained", "job": "jobs run", "page": "pages"}
GIVEN = "measuring only"  # ends the name of a way that is given the reference's networks


def chapter_tables() -> dict[str, str]:
    """Return the tables that the chapter includes, by file name, from what is recorded."""
    return {
        "reruns.md": _recorded(RERUNS, reruns_table),
        "agreement.md": _recorded(AGREEMENT, agreement_tables),
        "errors.md": _recorded(POWER, errors_table),
        "synflow-counts.md": _recorded(SYNFLOW, synflow_table),
    }


def _recorded(path, table) -> str:
    if not path.exists():
        program = path.stem.replace("-", "_")
        return f"Nothing is recorded: `.venv/bin/python benchmarks/{program}.py --record` does that.\n"
    return table(recorded_json(path))


def errors_table(found: Mapping) -> str:
    """Return how often the verdict errs on made-up studies, as a table in Markdown."""
    head = ["seeds", "tickets of a study", "spread over trainings", "equal, and some metric is called lost"]
    head += ["worse by twice the tolerance, and a metric is called kept"]
    lines = [
        [
            f"{line['seeds']}",
            f"{line['rounds']}",
            f"{line['trainings']:g} tolerances" + (", unlike by ticket" if line["unlike"] else ""),
            f"{100 * line['lost']:.1f} %",
            f"{100 * line['kept']:.1f} %",
        ]
        for line in found["errors"]
    ]
    made = (
        f"{found['studies']:,} studies a line, a fifth of that for the last column. {_provenance(found['provenance'])}"
    )
    return f"{markdown_table(head, lines)}\n\n{made}\n"


def synflow_table(found: Mapping) -> str:
    """Return what SynFlow's counts do to masks and accuracy, as a table in Markdown."""
    head = [
        "sparsity",
        "counts that differ, of 100",
        "overlap of the masks (Jaccard)",
        "accuracy, published counts",
        "accuracy, nearest counts",
    ]
    head += ["difference ± its standard error", "spread over seeds"]
    lines = [
        [
            f"{100 * line['sparsity']:.1f} %",
            f"{line['counts']}",
            f"{line['overlap']:.2f}",
            *(f"{100 * line[name]:.2f} %" for name in ("published", "nearest")),
            f"{100 * line['difference']:+.2f} ± {100 * line['standard_error']:.2f}",
            f"{100 * line['over_seeds']:.2f}",
        ]
        for line in found["lines"]
    ]
    made = f"MNIST-5k, ResNet-8, {found['seeds']} pairs of trainings a line, in percentage points of the test images."
    return f"{markdown_table(head, lines)}\n\n{made} {_provenance(found['provenance'])}\n"


def reruns_table(found: Mapping) -> str:
    """Return what is made again after each change, as a table in Markdown."""
    every = found["every"]
    head = ["change", *(f"{title} (of {len(every[kind])})" for kind, title in KINDS.items()), "the book"]
    lines = []
    for line in found["changes"]:
        counts = [str(len(line.get(kind, ()))) for kind in KINDS]
        lines.append([line["change"], *counts, "again" if line.get("book") else "–"])
    return f"{markdown_table(head, lines)}\n\n{_provenance(found['provenance'])}\n"


def deviation(value: pd.Series, other: pd.Series) -> pd.Series:
    """Return how far numbers are apart: the difference, divided by the larger of the two where that exceeds 1."""
    scale = pd.concat([value.abs(), other.abs()], axis=1).max(axis=1).clip(lower=1.0)
    return (value - other).abs() / scale


def agreement_tables(found: Mapping) -> str:
    """Return what is the same and how far the rest is apart, as two tables in Markdown."""
    head = ["precision", "against one worker of one thread", "networks", "masks found before training"]
    head += ["masks found later", "rows"]
    lines = []
    for run in found["runs"]:
        rows = [sum(part[name] for part in run["dimensions"].values()) for name in ("same", "rows")]
        made = [_of(run["networks"]), *(_masks(run[f"masks_{when}"]) for when in ("at_init", "trained"))]
        if run["way"].endswith(GIVEN):
            made = ["given"] * len(made)
        lines.append([run["precision"], run["way"], *made, _of(rows)])
    same = markdown_table(head, lines)
    return f"{same}\n\n{_tolerances(found)}\n\n{_provenance(found['provenance'])}\n"


def _tolerances(found: Mapping) -> str:
    threads = [run for run in found["runs"] if "threads" in run["way"]]
    head = ["dimension", *(f"{run['way']}, {run['precision']}" for run in threads)]
    head += [f"another seed, {precision}" for precision in found["seeds"]]
    columns = [run["dimensions"] for run in threads] + list(found["seeds"].values())
    lines = [
        [dimension.title, *(f"{column[name]['largest']:.1g} ({column[name]['median']:.1g})" for column in columns)]
        for name, dimension in DIMENSIONS.items()
    ]
    return markdown_table(head, lines)


def _of(pair: Sequence[int]) -> str:
    same, every = pair
    return f"all {every:,}" if same == every else f"{same:,} of {every:,}"


def _masks(counts: Sequence[int]) -> str:
    same, every, differ, kept = counts
    return _of((same, every)) + (f"; {100 * differ / kept:.2g} % of the weights kept are others" if differ else "")


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    every = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in every)


def _provenance(made: Mapping) -> str:
    return (
        f"Recorded on {made['time'][:10]} at commit {made['commit']}, with Python {made['python']} and PyTorch "
        f"{made['torch']} on {made['processor']}."
    )
