"""The chapter on what the blog post asked for: what the rows of the studies answer, or the command that would."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lthlib import figures
from lthlib.book.cost import PAPER
from lthlib.book.grid import read_grid, study_name
from lthlib.book.markdown import plain, table
from lthlib.book.plan import COMPARISON, PagePlan
from lthlib.core.store import ROOT
from lthlib.metrics import METRICS
from lthlib.pruning import METHODS
from lthlib.results.claims_parts import UNMEASURED, Evidence
from lthlib.results.evaluate import DIMENSIONS
from lthlib.results.reasons import why_less_flat

CIFAR, EVERY_METHOD = "workflow/grids/cifar10.yml", "workflow/grids/methods.yml"
NOTHING = "Not measured here."
SETTINGS = ("sce", "weight_hessian_trace", "input_hessian_trace")


def questions_pages(studies: Sequence[Evidence], plans: Sequence[PagePlan]) -> dict[str, str]:
    """Return the files that the chapter includes, by name, as Markdown."""
    beside = {topic: [p for p in plans if (p.topic, p.method) == (topic, COMPARISON)] for topic in DIMENSIONS}
    on_cifar = [p for p in plans if p.study.startswith("cifar") and p.method == "rigl"]
    every = [p for of in beside.values() for p in of if p.grid == Path(EVERY_METHOD).stem]
    votes = [m for m in METRICS.values() if m.in_verdict]
    four = {of.title: [m.name for m in votes if m.dimension == d] for d, of in DIMENSIONS.items()}
    cut = [name for name, m in METHODS.items() if m.family == "structured"]
    photos = [e for e in studies if e.rows["dataset"].iloc[0].startswith("imagenet")]
    explained = {name: [name] for name in ("fidelity", "stability")}
    return {
        "question-imagenet.md": _tallies(photos, METHODS, explained, PAPER[1]) + _pages(beside["interpretability"]),
        "question-settings.md": settings(studies) + _pages(beside["calibration"] + beside["flatness"]),
        "question-rigl.md": rigl_on_cifar(studies) + _pages(on_cifar),
        "question-structured.md": _tallies(studies, cut, four, EVERY_METHOD) + _pages(every),
        "question-metrics.md": metrics_table(ROOT / "book" / "metrics"),
        "question-flat.md": ("\n\n".join(map(less_flat, studies)) or NOTHING) + _pages(beside["flatness"]),
    }


def settings(studies: Sequence[Evidence]) -> str:
    """Return how SCE and both traces are kept in every study, and the paper's settings that none is about."""
    shown = {f"{METRICS[name].title} {METRICS[name].arrow}": [name] for name in SETTINGS}
    lines = [{"setting": plain(e.label), **{t: tally(e, METHODS, of) for t, of in shown.items()}} for e in studies]
    here = {(e.rows["dataset"].iloc[0], e.rows["arch"].iloc[0]) for e in studies}
    left = {g: [s for s in read_grid(ROOT / g, recorded=True).studies if (s.data, s.arch) not in here] for g in PAPER}
    unmeasured = dict.fromkeys(shown, UNMEASURED)
    lines += [{"setting": f"the paper's `{study_name(s)}`", **unmeasured} for of in left.values() for s in of]
    return table(lines) + _command(*(grid for grid, of in left.items() if of))


def rigl_on_cifar(studies: Sequence[Evidence]) -> str:
    """Return every metric of the paper by sparsity, of RigL in each study of CIFAR images."""
    parts = []
    for e in (e for e in studies if e.rows["dataset"].iloc[0].startswith("cifar")):
        cells: dict[str, dict[str, str]] = {}
        for line in e.judged[e.judged["method"] == "rigl"].sort_values("round", kind="stable").to_dict("records"):
            if METRICS[line["metric"]].in_verdict:
                name, scale = figures.label(line["metric"]), figures.factor(line["metric"])
                name += f" {line['shift']}" * (line["shift"] != "none")
                row = cells.setdefault(name, {"metric": plain(name)})
                row["dense"] = f"{scale * line['dense']:.3g}"
                row[f"{100 * line['sparsity']:.1f} %"] = f"{scale * line['mean']:.3g} {figures.MARKS[line['outcome']]}"
        parts += [f"**{plain(e.label)}.**\n\n{table(cells.values())}"] * bool(cells)
    return ("\n\n".join(parts) or NOTHING) + _command(CIFAR)


def less_flat(e: Evidence) -> str:
    """Say of one study whether RigL is less flat than other methods, and which reasons its rows leave."""
    said, parts = why_less_flat(e)
    return "\n".join([f"**{plain(e.label)}.** {said or NOTHING}\n", *(f"- {part.said}" for part in parts)])


def metrics_table(folder: Path) -> str:
    """Return why each metric is there, what it is good for and where it misleads, from the pages on them."""
    pages = {re.match(r"\((.+)\)=\n", t := path.read_text())[1]: t for path in folder.glob("*.md")}
    lines = []
    for label in re.findall(r"\]\(#(metric-[\w-]+)\)", pages["metrics"]):
        title, text = re.search(r"^# (.+)", pages[label], flags=re.M)[1], pages[label]
        why = re.split(r"(?<=[.?!])\s+", text.split("## Why it is there\n\n")[1].split("\n\n")[0])[:2]
        good = re.search(r"^\*\*Good for:\*\* (.+)", text, flags=re.M)[1]
        limits = re.split(r"\n## Where \w+ misleads?\n", text)[1].split("\n## ")[0]
        heads = [head.rstrip(".") for head in re.findall(r"^- \*\*(.+?)\*\*", limits, flags=re.M)]
        cells = {"metric": f"[{title}](#{label})", "why it is there": " ".join(why), "good for": good}
        lines.append({**cells, "misleads by": "; ".join(heads)})
    return table(lines)


def tally(e: Evidence, methods: Iterable[str], metrics: Iterable[str]) -> str:
    """Return how often methods keep, lose and so on some metrics, over all sparsities and shifts."""
    lines = e.judged[e.judged["method"].isin(list(methods)) & e.judged["metric"].isin(list(metrics))]
    count = lines.drop_duplicates(["method", "round", "metric", "shift", "severity"])["outcome"].value_counts()
    return ", ".join(f"{mark} {count[o]}" for o, mark in figures.MARKS.items() if count.get(o)) or UNMEASURED


def _tallies(studies: Sequence[Evidence], methods: Iterable[str], columns: Mapping[str, list[str]], grid: str) -> str:
    """Return a table of tallies for each study that has any, a line a method; and the grid that measures the rest."""
    parts, missing = [], []
    for e in studies:
        lines = [{"method": METHODS[m].title, **{t: tally(e, [m], of) for t, of in columns.items()}} for m in methods]
        if lines := [line for line in lines if {line[name] for name in columns} != {UNMEASURED}]:
            parts.append(f"**{plain(e.label)}.**\n\n{table(lines)}")
            missing = [name for name in columns if {line[name] for line in lines} == {UNMEASURED}]
            parts += [f"The rows of this study hold nothing yet on {' and '.join(missing).lower()}."] * bool(missing)
    return ("\n\n".join(parts) or NOTHING) + _command(*[grid] * (not parts or bool(missing)))


def _command(*grids: str) -> str:
    lines = "\n".join(f"make report GRID={grid}" for grid in grids)
    return f"\n\nWhat is missing is measured by\n\n```bash\n{lines}\n```" if grids else ""


def _pages(plans: Sequence[PagePlan]) -> str:
    links = "; ".join(f"[{p.title} ({p.grid})](/{p.file})" for p in plans)
    return f"\n\nPages: {links}." if links else ""
