"""The book's front: the answer of each grid, the status of each page, and the table of contents."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import yaml
from matplotlib.figure import Figure

from lthlib import figures
from lthlib.book import cost, explorer, markdown, ratios, reproducibility
from lthlib.book.claims import claims_pages
from lthlib.book.grid import ON_METHODS, Grid, study_name
from lthlib.book.markdown import plain, svg
from lthlib.book.plan import BUILD, COMPARISON, GENERATED, Job, PagePlan, recorded_grids
from lthlib.book.questions import questions_pages
from lthlib.book.reference import reference_pages
from lthlib.book.studies import passes
from lthlib.core import machine
from lthlib.core.errors import UserError
from lthlib.core.forks import in_forks
from lthlib.core.store import ROOT, Store, write_atomically
from lthlib.figures import methods
from lthlib.pruning import METHODS
from lthlib.pruning.masks import sparsity_of
from lthlib.results import verdict
from lthlib.results.claims_parts import Evidence
from lthlib.results.collect import rows_of
from lthlib.results.evaluate import DIMENSIONS, Evaluation, evaluate, question
from lthlib.results.recorded import RATIOS, RESULTS, read_records
from lthlib.tickets.study import Study


def write(
    grid: Grid, store: Store, plans: Sequence[PagePlan], undone: Sequence[Job], grid_file: str, workers: int
) -> None:
    """Write what the book's static pages include, and a stub in the place of each missing page.

    What all parts need is read once; then each is made in a fork.

    Args:
        grid: Whose book it is; recorded results of other grids come after it.
        store: Where its evaluations lie.
        plans: All pages, what is missing said in them.
        undone: Jobs that are not finished: the answer is that of the others.
        grid_file: The grid file, for the stubs to name.
        workers: How many parts are made at a time.
    """
    for page in plans:
        if page.missing:
            write_atomically(ROOT / "book" / page.file, _stub(page, grid_file))
    figures.use_style()
    studies = [(grid, study, _evidence(grid, study, measured(grid, study, store, undone))) for study in grid.studies]
    for other in recorded_grids(grid.name):
        studies += [(other, study, _evidence(other, study, _recorded(other, study))) for study in other.studies]
    studies = _told_apart(sorted(studies, key=lambda of: -of[2].passes))  # those that have learned most come first
    told = [evidence for _, _, evidence in studies if not evidence.judged.empty]
    parts: dict[str, Callable[[], Mapping[str, str | bytes]]] = {
        "claims": lambda: claims_pages(told),
        "explorer": lambda: explorer.files({f"{of.name}/{study_name(study)}": each for of, study, each in studies}),
        "methods": lambda: {"methods.md": _methods(plans, studies)},
        "answer": lambda: {"answer.md": _answers(grid, studies, undone)},
        "questions": lambda: questions_pages(told, plans),
        "status, tables and contents": lambda: {
            "power.md": markdown.recorded(reproducibility.POWER, _power),
            "limits.md": markdown.recorded(RATIOS, _limits),
            **ratios.chapter_tables(),
            "status.md": _status(plans),
            "cost.md": cost.chapter_table(),
            **reproducibility.chapter_tables(),
            **reference_pages(),
            "_toc.yml": _contents(plans, ROOT / "book" / "contents.yml"),
        },
    }
    lost = in_forks({name: partial(_put, make) for name, make in parts.items()}, BUILD / "logs" / "front", workers)
    if lost:
        told = "; ".join(f"{name}: {said.removeprefix('error: ')}" for name, said in lost.items())
        raise UserError(f"Parts of the book's front could not be made. {told} (logs: {BUILD / 'logs' / 'front'})")


def _put(make: Callable[[], Mapping[str, str | bytes]]) -> None:
    for name, text in make().items():
        write_atomically(GENERATED / name, text if isinstance(text, bytes) else text.rstrip("\n") + "\n")


def _power(found: Mapping) -> str:
    """Draw how often a metric is called kept in made-up studies, as `benchmarks/verdict.py` recorded it."""
    caption = (
        "How often one metric is called kept, against the number of images. Left: a network equal to its parent, "
        "which ought to be called so; dotted, 80 %. Right: a network that is worse by twice the tolerance; dotted, 5 %."
    )
    return _picture(figures.power_curves(pd.DataFrame(found["power"])), "power.svg", caption)


def _limits(found: Mapping) -> str:
    """Draw how far training is from what the processor allows, as `benchmarks/ratios.py` recorded it."""
    caption = (
        "Images a second when a ResNet-20 is trained with masks: one training on all threads, as many at once as there "
        "are cores; and what the processor's rate of multiplying, and of moving what no cache holds, would allow."
    )
    table = ratios.limits(found["machines"])
    return _picture(figures.limit_bars(table), "limits.svg", caption) if len(table) else ratios.NOT_YET


def _stub(page: PagePlan, grid_file: str) -> str:
    """Return a page that says what is missing, why, and how to make it."""
    parameters = yaml.safe_dump(dict(page.parameters), default_flow_style=True, width=10**6).strip()
    alone = shlex.join([".venv/bin/papermill", page.template, "page.ipynb", "-y", parameters])
    return (
        f"# {page.title}\n\n```{{warning}}\nThis page is missing: it could not be made.\n```\n\n"
        f"`````text\n{page.missing}\n`````\n\nMake it again, with everything else that is missing:\n\n"
        f"```bash\nmake report GRID={shlex.quote(grid_file)}\n```\n\n"
        f"Or alone, to look for the fault:\n\n`````bash\n{alone}\n`````\n"
    )


def _told_apart(studies: Sequence[tuple[Grid, Study, Evidence]]) -> list[tuple[Grid, Study, Evidence]]:
    """Add the grid's name to a label that another study has, too: findings are kept by label."""
    labels = [e.label for _, _, e in studies]
    return [
        (g, s, e if labels.count(e.label) == 1 else replace(e, label=f"{e.label} ({g.name})")) for g, s, e in studies
    ]


# --- the answer --------------------------------------------------------------------------------------------------


def measured(grid: Grid, study: Study, store: Store, undone: Sequence[Job] = ()) -> dict[str, list[Evaluation]]:
    """Return the evaluations of a study's finished jobs by dimension."""
    left_out = {(job.study, job.method, job.seed) for job in undone}
    mine = [t for t in study.tickets() if (study_name(study), t.method, t.seed) not in left_out]
    return {
        name: [evaluate(ticket, name, store, given, grid.precision) for ticket in mine]
        for name, given in grid.dimensions.items()
    }


def _recorded(grid: Grid, study: Study) -> dict[str, list[Evaluation]]:
    """Return the recorded evaluations of a study by dimension."""
    records, found = read_records(ROOT / RESULTS), {}
    for name, given in grid.dimensions.items():
        asked = question(name, DIMENSIONS[name].parameters(given), grid.precision)
        there = ((ticket, records.get((ticket.id, asked))) for ticket in study.tickets())
        found[name] = [record.evaluation(ticket) for ticket, record in there if record]  # pages say what is missing
    return found


def _evidence(grid: Grid, study: Study, found: dict[str, list[Evaluation]]) -> Evidence:
    """Return what a study has to say: its rows, replicates and thresholds."""
    every = [e for some in found.values() for e in some]
    replicates: dict[str, dict] = {e.ticket.id: {} for e in every}
    for e in every:  # accuracy belongs to every dimension: the first one's rows count, and its replicates
        replicates[e.ticket.id] = {**e.arrays, **replicates[e.ticket.id]}
    rows = pd.concat([rows_of(some, dimension) for dimension, some in found.items()], ignore_index=True)
    title = grid.title if len(grid.studies) == 1 else f"{grid.title}: {study_name(study)}"
    return Evidence(
        title,
        rows.drop_duplicates(["ticket", *verdict.CASE]),
        every[0].provenance["n_classes"] if every else 2,
        replicates,
        verdict.thresholds_from(grid.thresholds),
        grid.name,
        passes(study),
    )


def _answers(grid: Grid, studies: Sequence[tuple[Grid, Study, Evidence]], undone: Sequence[Job]) -> str:
    """Return the answers of the studies that ask for everything, the first and the run's own open, others folded."""
    everything = lambda of: of[0].dimensions.keys() == DIMENSIONS.keys() and not of[2].judged.empty
    parts = []
    for of in (of for of in studies if of[0] is grid or everything(of)):
        title, answer = plain(of[2].label), _answer(*of, undone if of[0] is grid else ())
        is_open = not parts or of[0] is grid
        parts.append(f"## {title}\n\n{answer}" if is_open else f"`````{{dropdown}} {title}\n{answer}\n`````")
    return "\n\n".join(parts)


def _answer(grid: Grid, study: Study, evidence: Evidence, undone: Sequence[Job]) -> str:
    """Return the answer of one study as Markdown; its pictures are written beside it."""
    names = ", ".join(job.name for job in undone)
    parts = [f"```{{warning}}\nNot finished, and left out of this answer: {names}.\n```"] * bool(undone)
    rows, judged = evidence.rows, evidence.judged
    if judged.empty:  # of an unfinished grid
        return "\n\n".join(parts)
    passes, name = verdict.lth_pass(judged), f"{grid.name}-{study_name(study)}"
    caption = (
        "How far each method is shown to keep each metric: the highest sparsity (in percent) without a break, – for "
        "none; and what ends it: ↘ a loss, ? that no more is shown (hatched), ✗ collapse, nothing at the last round."
    )
    picture = figures.reach_map(verdict.reach(judged), verdict.ends(judged))
    parts += [_passes(passes), _picture(picture, f"answer-{name}.svg", caption)]
    parts += [_dimension_table(judged, passes)]
    parts += [_scorecard(rows, judged, f"scorecard-{name}.svg")]
    lacking = f" The study's grid asks for {grid.lacking} more, which are not recorded yet." if grid.lacking else ""
    seeds = f"seed{'s' * (len(study.seeds) > 1)} {', '.join(map(str, study.seeds))}"
    parts += [f"{rows['ticket'].nunique()} tickets, {seeds}.{lacking}"]
    return "\n\n".join(parts)


def _picture(figure: Figure, name: str, caption: str) -> str:
    write_atomically(GENERATED / name, svg(figure))
    return markdown.picture(name, caption)


def _scorecard(rows: pd.DataFrame, judged: pd.DataFrame, name: str) -> str:
    """Draw the paper's first figure of one study, folded away."""
    n = verdict.standing_round(judged)
    shown = rows[(rows["round"] == n) | (rows["method"] == "dense")]
    caption = (
        f"Each metric of the paper at {100 * sparsity_of(n):.1f} % sparsity, scaled so that the best network shown is "
        "at the rim and the worst in the centre, whatever lies between them ([](#how-to-read))."
    )
    picture = _picture(figures.radar(verdict.scorecard(verdict.summarise(shown))), name, caption)
    return f"````{{dropdown}} At one sparsity, as the paper's first figure has it\n{picture}\n````"


def _passes(passes: pd.DataFrame) -> str:
    """Say which sparse networks are an LTH-PASS, and of how many it is not known."""
    count = passes["outcome"].value_counts()
    lost = count.get(verdict.LOST, 0) + count.get(verdict.COLLAPSED, 0)
    tally = (
        f"Of {len(passes)} sparse networks {count.get(verdict.KEPT, 0)} are shown to keep every metric, {lost} lose at "
        f"least one for certain, of {count.get(verdict.NOT_SHOWN, 0)} it is not shown."
    )
    won = passes[passes["passed"]].sort_values("round").groupby("method", sort=False).tail(1)
    if won.empty:
        return f"There is no **LTH-PASS** here. {tally}"
    best = [f"{METHODS[m].title} ({100 * s:.1f} %)" for m, s in zip(won["method"], won["sparsity"], strict=True)]
    return f"**LTH-PASS**: {', '.join(best)}; in brackets the highest such sparsity. {tally}"


def _dimension_table(judged: pd.DataFrame, passes: pd.DataFrame) -> str:
    """Return the reach in each dimension and in all together, each with what ends it."""
    reached, ends = verdict.reach(judged, by="dimension"), verdict.ends(judged, by="dimension")
    titles, lines = [*(DIMENSIONS[name].title for name in reached), "everything"], []
    for method, line in reached.iterrows():
        if METHODS[method].family == "dense":  # trained as long as a ticket: a control, no sparse network
            continue
        mine = passes[passes["method"] == method].sort_values("round")
        kept = mine[mine["passed"].cumprod().astype(bool)]
        every = kept["sparsity"].iloc[-1] if len(kept) else float("nan")
        end = next((outcome for outcome in mine["outcome"] if outcome != verdict.KEPT), "")
        cells = zip(titles, [*line, every], [*ends.loc[method], end], strict=True)
        shown = {t: ("–" if v != v else f"{100 * v:.1f} %") + f" {figures.MARKS[e]}" for t, v, e in cells}
        lines.append({"method": METHODS[method].title, **shown})
    return markdown.table(lines)


# --- status and contents -----------------------------------------------------------------------------------------


def _status(plans: Sequence[PagePlan]) -> str:
    lines = []
    for page in plans:
        seconds, at = "missing", ""
        if not page.missing:
            run = json.loads(page.notebook.read_text())["metadata"]["papermill"]
            seconds, at = f"{run['duration']:.1f}", run["end_time"][:19].replace("T", " ")
        lines.append({"page": f"[{page.title}](/{page.file})", "seconds": seconds, "made at (UTC)": at})
    build = "\n".join(f"- {name}: {value}" for name, value in machine.provenance("auto").items())
    return (
        f"(status)=\n# Status\n\nThis build:\n\n{build}\n\nWhat it took to make each page, its results being there; "
        "the commit and machine behind its numbers are named on the page itself.\n\n" + markdown.table(lines)
    )


def _methods(plans: Sequence[PagePlan], studies: Sequence[tuple[Grid, Study, Evidence]]) -> str:
    """Draw each method in every study between two comments, for the chapter on it to include, with links to pages."""
    parts = []
    for name, method in METHODS.items():
        if name == "dense":
            continue
        mine = [of for of in studies if name in set(of[2].judged["method"])]
        found = f"{method.title} was not measured for this build: name `{name}` among the `methods` of a grid."
        if mine:
            cells = [f":::{{grid-item}}\n{_seen(plans, name, *of)}\n:::" for of in mine]
            found = f"{method.title} (`{name}`):\n\n::::{{grid}} 1 1 2 2\n" + "\n".join(cells) + "\n::::"
        parts.append(f"<!-- {name}: begin -->\n\n{found}\n\n<!-- {name}: end -->\n")
    return "\n".join(parts)


def _seen(plans: Sequence[PagePlan], method: str, grid: Grid, study: Study, evidence: Evidence) -> str:
    """Draw a method's accuracy in one study, and name the pages on it there."""
    judged, file = evidence.judged, f"method-{method}-{grid.name}-{study_name(study)}.svg"
    write_atomically(GENERATED / file, svg(methods.accuracy_beside(judged, method), box=None))
    line = judged[(judged["method"] == method) & (judged["metric"] == "test_accuracy")].sort_values("round")
    first, last = (
        f"{100 * v['mean']:.1f} % at {100 * v['sparsity']:.1f} % sparsity" for _, v in line.iloc[[0, -1]].iterrows()
    )
    alt = f"Test accuracy of {METHODS[method].title}: {first}, {last}; dense {100 * line['dense'].iloc[0]:.1f} %"
    there = {p.method: p for p in plans if (p.grid, p.study, p.topic) == (grid.name, study_name(study), ON_METHODS)}
    links = [
        f"[{text}](/{there[of].file})"
        for of, text in ((method, "its masks"), (COMPARISON, "all methods"))
        if of in there
    ]
    return f"![{alt}](/_generated/{file})\n\n{plain(evidence.label)}: {', '.join(links)}"


def _contents(plans: Sequence[PagePlan], template: Path) -> str:
    """Fill the table of contents: an entry ``{generated: topic}`` becomes that topic's pages."""
    toc = yaml.safe_load(template.read_text())
    for part in toc["parts"]:
        part["chapters"] = list(_filled(part["chapters"], plans))
    toc["parts"] = [part for part in toc["parts"] if part["chapters"]]  # a grid need not have every dimension
    return yaml.safe_dump(toc, sort_keys=False, allow_unicode=True)


def _filled(chapters: Sequence[dict], plans: Sequence[PagePlan]) -> Iterator[dict]:
    for chapter in chapters:
        if "generated" not in chapter:
            yield chapter
            continue
        mine = [page for page in plans if page.topic == chapter["generated"]]
        firsts = [page for page in mine if page.method == COMPARISON]
        for first in firsts:
            alike = sum(page.label == first.label for page in firsts) > 1
            sections = [p for p in mine if (p.grid, p.study) == (first.grid, first.study) and p is not first]
            entry = _entry(first, f"All methods: {first.label}" + f" ({first.grid})" * alike)
            if sections:
                entry["sections"] = [_entry(p, METHODS[p.method].title) for p in sections]
            yield entry


def _entry(page: PagePlan, title: str) -> dict[str, object]:
    return {"file": str(Path(page.file).with_suffix("")), "title": title + " (missing)" * bool(page.missing)}
