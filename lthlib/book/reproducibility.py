"""What the chapters on reproducibility and on the verdict show: tables drawn from recorded results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lthlib.core.store import ROOT
from lthlib.results.evaluate import DIMENSIONS
from lthlib.results.recorded import recorded_json

RERUNS = ROOT / "book" / "results" / "reruns.json"  # by benchmarks/reruns.py
AGREEMENT = ROOT / "book" / "results" / "agreement.json"  # by benchmarks/agreement.py
POWER = ROOT / "book" / "results" / "power.json"  # by benchmarks/verdict.py
KINDS = {"tickets": "networks trained", "job": "jobs run", "page": "pages"}
GIVEN = "measuring only"  # ends the name of a way that is given the reference's networks


def chapter_tables() -> dict[str, str]:
    """Return the tables that the chapter includes, by file name, from what is recorded."""
    return {
        "reruns.md": _recorded(RERUNS, reruns_table),
        "agreement.md": _recorded(AGREEMENT, agreement_tables),
        "errors.md": _recorded(POWER, errors_table),
    }


def _recorded(path, table) -> str:
    if not path.exists():
        return f"Nothing is recorded: `.venv/bin/python benchmarks/{path.stem}.py --record` does that.\n"
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
    return f"{_markdown(head, lines)}\n\n{made}\n"


def reruns_table(found: Mapping) -> str:
    """Return what is made again after each change, as a table in Markdown."""
    every = found["every"]
    head = ["change", *(f"{title} (of {len(every[kind])})" for kind, title in KINDS.items()), "the book"]
    lines = []
    for line in found["changes"]:
        counts = [str(len(line.get(kind, ()))) for kind in KINDS]
        lines.append([line["change"], *counts, "again" if line.get("book") else "–"])
    return f"{_markdown(head, lines)}\n\n{_provenance(found['provenance'])}\n"


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
    same = _markdown(head, lines)
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
    return _markdown(head, lines)


def _of(pair: Sequence[int]) -> str:
    same, every = pair
    return f"all {every:,}" if same == every else f"{same:,} of {every:,}"


def _masks(counts: Sequence[int]) -> str:
    same, every, differ, kept = counts
    return _of((same, every)) + (f"; {100 * differ / kept:.2g} % of the weights kept are others" if differ else "")


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    every = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in every)


def _provenance(made: Mapping) -> str:
    return (
        f"Recorded on {made['time'][:10]} at commit {made['commit']}, with Python {made['python']} and PyTorch "
        f"{made['torch']} on {made['processor']}."
    )
