"""A grid's way into the book: its jobs, its pages, its tables, the front page.

The functions named like commands (`tickets`, `rows`, `front`, `record`) are what ``python -m lthlib`` runs.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import yaml
from tqdm import tqdm

from lthlib import data
from lthlib.book import cost as estimate
from lthlib.book import generated, reproducibility
from lthlib.book.grid import ON_METHODS, Grid, read_grid, study_name
from lthlib.core import machine as compute
from lthlib.core.errors import UserError
from lthlib.core.store import MANIFEST, ROOT, Store, say, seal, whole_folder, write_atomically
from lthlib.core.versions import code_version, script_version
from lthlib.data.corruptions import CORRUPTIONS
from lthlib.metrics import METRICS
from lthlib.networks import ARCHITECTURES
from lthlib.pruning import METHODS
from lthlib.results import overlaps, verdict
from lthlib.results.evaluate import (
    COLUMNS,
    DIMENSIONS,
    LATENCY,
    Archive,
    Evaluation,
    collect,
    evaluate,
    measuring,
    question,
    rows_of,
)
from lthlib.tickets.predictions import Subject
from lthlib.tickets.study import Study
from lthlib.tickets.ticket import Ticket, version_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "book/results"
COMPARISON = "comparison"
STUB = "-missing.md"
TABLES = ("rows.csv", "costs.csv", "provenance.csv")
PICTURES = ("answer", "scorecard")
RECORDS = (estimate.THROUGHPUT, reproducibility.RERUNS, reproducibility.AGREEMENT)
TOPICS = {name: dimension.title for name, dimension in DIMENSIONS.items()} | {ON_METHODS: "Methods"}


# --- jobs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One method and one seed of a study, at every round: what a worker trains and measures in one go."""

    study: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Its name within the grid."""
        return f"{self.study}/{self.method}-s{self.seed}"


def jobs(grid: Grid) -> list[Job]:
    """Return a grid's jobs: dense first, then the longest chains (whose rounds build on one another)."""
    return [
        Job(study_name(study), method, seed)
        for study in grid.studies
        for method in ("dense", *sorted(study.methods, key=lambda m: METHODS[m].source != "previous"))
        for seed in study.seeds
    ]


def needs(grid: Grid, job: Job) -> list[Job]:
    """Return the jobs whose tickets a job builds on, so that no worker waits for another's lock.

    The seed to which flatness draws its lines is not among them: seeds that go side by side meet its lock for a moment,
    while seeds one after the other would take a grid with many workers twice as long.
    """
    if job.method == "dense":
        return []
    source = METHODS[job.method].source
    named = [source] if source in grid.study(job.study).methods else []
    return [Job(job.study, method, job.seed) for method in ("dense", *named)]


def is_chain(job: Job) -> bool:
    """Say whether each round of a job builds on the one before."""
    return METHODS[job.method].source == "previous"


def job_settings(grid: Grid, job: Job) -> str:
    """Return everything of the grid that a job depends on, as text."""
    study = asdict(grid.study(job.study))
    study["options"] = study["options"].get(job.method, {})
    del study["methods"], study["seeds"]
    return json.dumps([study, grid.dimensions, grid.precision], sort_keys=True, default=list)


def job_of(grid: Grid, job: Job, store: Store) -> str:
    """Return a fingerprint of what a job's results come from: settings, code, its images and foreign ones, its sources.

    It changes when any result of the job would be made anew. It needs the images.
    """
    mine = tickets_of(grid, job)
    first = Subject(mine[0], store, grid.precision)
    measured = [measuring(first, name, DIMENSIONS[name].parameters(given)) for name, given in grid.dimensions.items()]
    networks = [f"{ticket.id} {version_of(ticket, first.data)}" for ticket in mine]
    return generated.fingerprint((), job_settings(grid, job), *networks, *measured)


def done_file(grid: Grid, job: Job) -> Path:
    """Return the file that says, in this checkout, that a job is done."""
    return ROOT / "_build" / "jobs" / grid.name / f"{job.name}.json"


def tickets_of(grid: Grid, job: Job) -> list[Ticket]:
    """Return the tickets of a job, round by round."""
    every = grid.study(job.study).tickets()
    return [ticket for ticket in every if ticket.method == job.method and ticket.seed == job.seed]


def tickets(grid: str, study: str, method: str, seed: int, done: Path | None = None) -> None:
    """Train and measure one method with one seed at every round of a study, then write ``done``."""
    plan, store = read_grid(grid), Store()
    job = Job(study, method, seed)
    mine = tickets_of(plan, job)
    if not mine:
        raise UserError(f"{method} with seed {seed} is not part of {study} in {grid}.")
    of = job_of(plan, job, store)
    for ticket in tqdm(mine, desc=f"{method}, seed {seed}", unit="ticket"):
        for dimension, parameters in plan.dimensions.items():
            evaluate(ticket, dimension, store, parameters, plan.precision)
    if done is not None:
        word = {"job": [study, method, seed], "of": of, "tickets": [ticket.id for ticket in mine]}
        write_atomically(done, seal(word))


def plan(grid: Grid) -> dict[str, dict[str, float]]:
    """Return the names of a grid's jobs and pages with their weights: how long each is beside others of its kind."""
    weights = {}
    for study in grid.studies:
        unit = estimate.macs(study.arch, size) * size.n if (size := estimate.SIZES.get(study.data)) else 1.0
        epochs = Counter()
        for ticket, n in estimate.trained(study):
            epochs[ticket.method, ticket.seed] += n
        for job in (job for job in jobs(grid) if job.study == study_name(study)):
            # On few images, measuring a ticket takes as long as some epochs; on many, next to nothing.
            measuring = 4 * len(tickets_of(grid, job))
            weights[job.name] = unit * (epochs[job.method, job.seed] + measuring)
    return {"jobs": weights, "pages": {page.path: 1.0 for page in pages(grid)}}


# --- pages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PagePlan:
    """One page of the book that papermill makes: a template, its parameters, where it goes.

    Its topic, one of `TOPICS`, is a dimension, or the methods themselves: their masks, costs and controls.
    """

    grid: str
    study: str
    topic: str
    method: str
    label: str
    title: str
    parameters: Mapping[str, object]
    missing: str = ""  # why it could not be made; a stub stands in its place

    @property
    def file(self) -> str:
        """What the book shows of it, relative to ``book``: the notebook, or where that is missing a stub."""
        return f"_generated/{self.path}" + (STUB if self.missing else ".ipynb")

    @property
    def path(self) -> str:
        """Path below ``book/_generated``, without suffix."""
        return f"{self.grid}/{self.study}/{self.topic}/{self.method}"

    @property
    def template(self) -> str:
        """The notebook it is made from, relative to the checkout."""
        return f"notebooks/{self.topic}.ipynb"

    @property
    def shown(self) -> list[str]:
        """The methods whose tickets it shows, dense among them."""
        methods = self.parameters["method"]
        return ["dense", *([methods] if isinstance(methods, str) else methods)]


def pages(grid: Grid, *, from_record: bool = False) -> list[PagePlan]:
    """Return the pages of a grid: for each study and topic the comparison, and where asked for a page a method.

    Args:
        grid: Which.
        from_record: Whether the pages show recorded results and compute nothing.
    """
    plans = []
    for study in grid.studies:
        for topic in (*grid.dimensions, ON_METHODS):
            for method in (COMPARISON, *(study.methods if topic in grid.method_pages else ())):
                plans.append(_page(grid, study, topic, method, from_record))
    return plans


def _page(grid: Grid, study: Study, topic: str, method: str, from_record: bool) -> PagePlan:
    about = METHODS[method].title if method != COMPARISON else "all methods"
    if topic == ON_METHODS:
        # A method is seen beside the others; any dimension's results hold tickets and accuracy.
        shown, dimension = COMPARISON, min(grid.dimensions, key=lambda name: name != "generalization")
        more = {"dimension": dimension, "about": method if method != COMPARISON else None}
    else:
        shown, dimension, more = method, topic, {}
    label = data.DATASETS[study.data].title if study.data in data.DATASETS else study.data
    settings = {
        "data": study.data,
        "arch": study.arch,
        "method": list(study.methods) if shown == COMPARISON else shown,
        "seeds": list(study.seeds),
        "rounds": list(study.rounds),
        "recipe": asdict(study.recipe),
        "rewind_epoch": study.rewind_epoch,
        "train_size": study.train_size,
        "options": {m: dict(o) for m, o in study.options.items() if shown in (COMPARISON, m)},
        "measure": dict(grid.dimensions[dimension]),
        "thresholds": dict(grid.thresholds),
        "precision": grid.precision,
        "recorded": RESULTS if from_record else None,
        "compute_missing": not from_record,
        **more,
    }
    label = f"{label}, {ARCHITECTURES[study.arch].title}"
    title = f"{TOPICS[topic]}: {about} on {label}"
    return PagePlan(grid.name, study_name(study), topic, method, label, title, settings)


def every_page(grid: Grid) -> list[PagePlan]:
    """Return the pages of the book of a grid: its own, and those of recorded results."""
    others = recorded_grids(grid.name)
    return pages(grid) + [page for other in others for page in pages(other, from_record=True)]


def results_of(grid: Grid, page: PagePlan) -> list[str]:
    """Return the files that tell of the results on a page: words of its jobs, or the manifest of what is recorded."""
    if page.grid != grid.name:
        found = [ROOT / RESULTS / page.grid / MANIFEST]
    else:
        mine = [job for job in jobs(grid) if job.study == page.study and job.method in page.shown]
        found = [done_file(grid, job) for job in mine]
    latency = ROOT / RESULTS / LATENCY.name
    if page.topic == ON_METHODS and latency.exists():
        found.append(latency)
    return [str(path.relative_to(ROOT)) for path in found]


def page_version(page: PagePlan) -> str:
    """Return a hash of the code of a page's template that this package holds, and of the words it shows."""
    cells = json.loads((ROOT / page.template).read_bytes())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return f"{script_version(code)}-{vocabulary()}"


def page_of(grid: Grid, page: PagePlan) -> str:
    """Return a fingerprint of what a page is made from: results, template, parameters, code, words."""
    return generated.page_of(page.template, page.parameters, page.title, page_version(page), results_of(grid, page))


@functools.cache
def vocabulary() -> str:
    """Return a hash of what tables and figures say of things: names, directions, units, definitions, who has a vote."""
    said = [repr(list(METRICS.values()))]
    said += [repr((m.name, m.title, m.family, m.reference, m.paper, m.source)) for m in METHODS.values()]
    said += [repr((d.name, d.title)) for d in DIMENSIONS.values()]
    said += [repr((name, s.title, s.ood)) for name, s in data.DATASETS.items()]
    said += [repr((a.name, a.title)) for a in ARCHITECTURES.values()]
    said += [repr((c.name, c.title, c.group)) for c in CORRUPTIONS.values()]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:12]


def recorded_grids(but: str) -> list[Grid]:
    """Return the grids of all recorded results, except the one of a name.

    Where a grid asks for all methods, these are the methods of its results, not those added since.
    """
    found, archive = [], Archive.read(ROOT / RESULTS)
    for folder in sorted(p.parent for p in (ROOT / RESULTS).glob(f"[!.]*/{MANIFEST}")):
        path = ROOT / "workflow" / "grids" / f"{folder.name}.yml"
        if folder.name != but:
            if not path.exists():
                raise UserError(f"{folder} holds recorded results of a grid that has no file {path}.")
            mine = [record.entry for record in archive.values() if record.folder == folder]
            known = {entry["info"]["ticket"]["method"] for entry in mine}
            grid = read_grid(path, recorded=True)
            studies = tuple(_with_methods(study, known) for study in grid.studies)
            found.append(replace(grid, studies=studies))
    return found


def _with_methods(study: Study, known: Collection[str]) -> Study:
    """Return a study of all methods with those of a record alone, and any other study as it is."""
    if set(study.methods) != set(METHODS) - {"dense"}:
        return study
    return replace(study, methods=tuple(name for name in study.methods if name in known))


# --- tables ------------------------------------------------------------------------------------------------------


def table(grid: Grid, store: Store, *, from_record: bool = False, without: Iterable[Job] = ()) -> pd.DataFrame:
    """Return every number of a grid as one tidy table, with ``round`` beside `lthlib.results.evaluate.COLUMNS`.

    Args:
        grid: Which.
        store: Where its evaluations are; those missing are computed.
        from_record: Read recorded results instead.
        without: Jobs that are left out.
    """
    every = evaluations(grid, store, from_record=from_record, without=without)
    return pd.concat([rows_of(found, dimension) for dimension, found in every], ignore_index=True)


def evaluations(
    grid: Grid, store: Store, *, from_record: bool = False, without: Iterable[Job] = ()
) -> Iterator[tuple[str, list[Evaluation]]]:
    """Yield each dimension with its evaluations, study by study; the arguments are those of `table`."""
    left_out = {(job.study, job.method, job.seed) for job in without}
    archive = Archive.read(ROOT / RESULTS) if from_record else {}
    for study in grid.studies:
        for dimension, parameters in grid.dimensions.items():
            name = question(dimension, DIMENSIONS[dimension].parameters(parameters), grid.precision)
            yield (
                dimension,
                [
                    archive[t.id, name].evaluation(t)
                    if from_record
                    else evaluate(t, dimension, store, parameters, grid.precision)
                    for t in study.tickets()
                    if (study_name(study), t.method, t.seed) not in left_out
                ],
            )


def tables_of(grid: Grid) -> str:
    """Return a fingerprint of what the tables of a grid are made from: the words of its jobs, and code."""
    return generated.fingerprint([done_file(grid, job) for job in jobs(grid)], code_version(rows), vocabulary())


def rows(grid: str, file: Path) -> None:
    """Write the tidy table of a finished grid, and beside it ``costs.csv`` and ``provenance.csv``."""
    plan, store = read_grid(grid), Store()
    of = tables_of(plan)
    every = list(evaluations(plan, store))
    tables = {
        "costs.csv": costs(plan, store),
        "provenance.csv": provenance(every),
        file.name: pd.concat([rows_of(found, dimension) for dimension, found in every])[list(COLUMNS)],
    }
    for name, found in tables.items():
        generated.write(file.with_name(name), found.to_csv(index=False), of)


def provenance(every: Iterable[tuple[str, list[Evaluation]]]) -> pd.DataFrame:
    """Return commit, versions, machine, precision and time behind the rows: a line a ticket and dimension.

    What the ticket was trained with has ``trained_`` in front.
    """
    lines = []
    for dimension, found in every:
        for e in found:
            trained = {f"trained_{name}": value for name, value in e.info["provenance"].items()}
            measured = {n: v for n, v in e.provenance.items() if n not in ("parameters", "n_classes")}
            lines.append({"ticket": e.ticket.id, "dimension": dimension, **measured, **trained})
    return pd.DataFrame(lines)


def costs(grid: Grid, store: Store) -> pd.DataFrame:
    """Return what each ticket of a finished grid costs: its counts, bytes, trainings and seconds, a line a ticket."""
    dimension, parameters = next(iter(grid.dimensions.items()))
    parts = []
    for study in grid.studies:
        tickets = collect(study, dimension, store, parameters=parameters, precision=grid.precision).tickets
        parts.append(tickets.drop(columns="density_by_layer").assign(dataset=study.data, arch=study.arch))
    found = pd.concat(parts, ignore_index=True)
    which = ["dataset", "arch", "method", "round", "seed", "ticket"]
    return found[[*which, *found.columns.drop(which)]]


def record(grid: str) -> None:
    """Put a grid's results into ``book/results/<grid>``, computing what is missing."""
    plan, store = read_grid(grid), Store()
    found = {}
    for dimension, parameters in plan.dimensions.items():
        name = question(dimension, DIMENSIONS[dimension].parameters(parameters), plan.precision)
        every = [t for study in plan.studies for t in study.tickets()]
        found[dimension] = [
            (name, evaluate(t, dimension, store, parameters, plan.precision)) for t in tqdm(every, desc=dimension)
        ]
    folder = ROOT / RESULTS / plan.name
    shared = pd.concat([overlaps.compare(study, store) for study in plan.studies])
    with whole_folder(folder) as new:
        Archive.write(new, found, {overlaps.FILE: shared[list(overlaps.COLUMNS)]})
    say(f"recorded {sum(map(len, found.values()))} evaluations in {folder.relative_to(ROOT)}")


# --- the book's front --------------------------------------------------------------------------------------------


def front(grid: str, folder: Path, unfinished: bool = False) -> None:
    """Write what the book's static pages include: answer (figure and table), status, links by method, contents.

    Args:
        grid: The grid file.
        folder: The book's generated part.
        unfinished: Whether jobs and pages may be missing. Then the answer is that of the finished jobs, and a stub
            that says why takes the place of each missing page.
    """
    plan, store = read_grid(grid), Store()
    of = "" if unfinished else front_of(plan)
    others = recorded_grids(plan.name)
    undone = [job for job in jobs(plan) if unfinished and not done_file(plan, job).exists()]
    files: dict[str, str | bytes] = {}
    sections = [_answer(plan, table(plan, store, without=undone), _classes_of_data, files, undone)]
    sections += [_answer(g, table(g, store, from_record=True), _recorded_classes, files) for g in others]
    plans = every_page(plan)
    for stub in folder.rglob(f"*{STUB}"):
        stub.unlink()
    if unfinished:
        plans = [replace(page, missing=_why_missing(plan, page, undone, folder)) for page in plans]
    for page in plans:
        if page.missing:
            write_atomically(folder.parent / page.file, _stub(page, grid))
    files |= {
        "answer.md": "\n\n".join(sections) + "\n",
        "status.md": _status(plans, folder),
        "methods.md": _methods(plans),
        "cost.md": estimate.chapter_table(),
        **reproducibility.chapter_tables(),
        generated.UNFINISHED if unfinished else generated.CONTENTS: _contents(plans, ROOT / "book" / "contents.yml"),
    }
    for name, content in files.items():
        generated.write(folder / name, content, of)


def front_of(grid: Grid) -> str:
    """Return a fingerprint of what the front is made from: words of jobs, records, pages, contents, code, settings."""
    others = recorded_grids(grid.name)
    files = [done_file(grid, job) for job in jobs(grid)]
    files += [ROOT / RESULTS / other.name / MANIFEST for other in others]
    files += [generated.FOLDER / f"{page.path}.ipynb" for page in every_page(grid)]
    files += [*estimate.PAPER, *RECORDS, "book/contents.yml"]
    return generated.fingerprint(files, repr([grid, *others]), code_version(front), vocabulary())


def front_files(grid: Grid) -> list[str]:
    """Return the names of the files that `front` writes for a finished grid."""
    studies = [(g.name, study) for g in (grid, *recorded_grids(grid.name)) for study in g.studies]
    drawn = [f"{kind}-{name}-{study_name(study)}.svg" for kind in PICTURES for name, study in studies]
    return [generated.CONTENTS, "answer.md", "status.md", "methods.md", "cost.md", *reproducibility.TABLES, *drawn]


def _why_missing(grid: Grid, page: PagePlan, undone: Iterable[Job], folder: Path) -> str:
    """Return why a page is missing, in the words of the log of what failed; empty where it is there."""
    behind = [
        job for job in undone if page.grid == grid.name and (job.study, job.method in page.shown) == (page.study, True)
    ]
    if behind:
        logs = [done_file(grid, job).with_suffix(".log") for job in behind]
        said = [f"{job.name}: {_last_words(log)}" for job, log in zip(behind, logs, strict=True)]
        return "It shows tickets that are not finished.\n" + "\n".join(said)
    if (folder / f"{page.path}.ipynb").exists():
        return ""
    return _last_words(ROOT / "_build" / "jobs" / grid.name / "pages" / f"{page.path}.log")


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    said = [line.rsplit("\r", 1)[-1].strip() for line in lines]
    return next((line for line in reversed(said) if line), "it was not begun")


def _stub(page: PagePlan, grid: str) -> str:
    """Return a page that says what is missing, why, and how to make it."""
    output = f"book/_generated/{page.path}.ipynb"
    alone = [".venv/bin/python", "-m", "lthlib.book.runner", page.template, output, "--title", page.title]
    alone += ["--parameters", json.dumps(page.parameters)]
    return (
        f"# {page.title}\n\n```{{warning}}\nThis page is missing: it could not be made.\n```\n\n"
        f"`````text\n{page.missing}\n`````\n\n"
        "Make it again, with everything else that is missing:\n\n"
        f"```bash\nmake report GRID={shlex.quote(grid)}\n```\n\n"
        f"Or alone, to look for the fault:\n\n`````bash\n{shlex.join(alone)}\n`````\n"
    )


def _answer(
    grid: Grid,
    found: pd.DataFrame,
    n_classes: Callable[[Study, pd.DataFrame], int],
    files: dict[str, str | bytes],
    undone: Collection[Job] = (),
) -> str:
    """Return the answer of one grid as Markdown; its pictures go to ``files``."""
    from lthlib import figures

    figures.use_style()
    parts = [f"## {grid.title}"]
    if undone:
        names = ", ".join(job.name for job in undone)
        parts.append(f"```{{warning}}\nNot finished, and left out of this answer: {names}.\n```")
    for study in grid.studies:
        mine = found[(found["dataset"] == study.data) & (found["arch"] == study.arch)]
        if set(mine["method"]) <= {"dense"}:  # of an unfinished grid
            continue
        judged = verdict.regions(mine, n_classes(study, mine), verdict.Thresholds(**grid.thresholds))
        reached = verdict.reach(judged)
        picture = f"answer-{grid.name}-{study_name(study)}.svg"
        files[picture] = _svg(figures.reach_map(reached))
        passes = verdict.lth_pass(judged)
        caption = (
            "How far each method keeps each metric: the highest sparsity (in percent) up to which it wins without a "
            "break; – where it loses at once."
        )
        parts += [_passes(passes), f"```{{figure}} /_generated/{picture}\n:width: 100%\n{caption}\n```"]
        parts += [_dimension_table(verdict.reach(judged, by="dimension"), passes)]
        parts += [_scorecard(mine, judged, files, f"scorecard-{grid.name}-{study_name(study)}.svg")]
        parts += [f"{mine['ticket'].nunique()} tickets, seeds {', '.join(map(str, study.seeds))}."]
    return "\n\n".join(parts)


def _svg(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", bbox_inches="tight")
    return drawn.getvalue()


def _scorecard(mine: pd.DataFrame, judged: pd.DataFrame, files: dict[str, str | bytes], picture: str) -> str:
    """Draw the paper's first figure of one study, folded away."""
    from lthlib import figures

    n = verdict.standing_round(judged)
    shown = mine[(mine["round"] == n) | (mine["method"] == "dense")]
    files[picture] = _svg(figures.radar(verdict.scorecard(verdict.summarise(shown))))
    sparsity = judged.loc[judged["round"] == n, "sparsity"].mean()
    caption = (
        f"Each metric of the paper at {100 * sparsity:.1f} % sparsity, scaled so that the best network shown is at the "
        "rim and the worst in the centre, whatever lies between them ([](#how-to-read))."
    )
    figure = f"```{{figure}} /_generated/{picture}\n:width: 100%\n{caption}\n```"
    return f"````{{dropdown}} At one sparsity, as the paper's first figure has it\n{figure}\n````"


def _classes_of_data(study: Study, _: pd.DataFrame) -> int:
    return len(data.load(study.data, Store(), study.train_size).classes)


def _recorded_classes(_: Study, mine: pd.DataFrame) -> int:
    for record_ in Archive.read(ROOT / RESULTS).values():
        if record_.entry["ticket"] in set(mine["ticket"]):
            return record_.entry["provenance"]["n_classes"]
    raise UserError("No recorded evaluation says how many classes its data set has.")


def _passes(passes: pd.DataFrame) -> str:
    won = passes[passes["passed"]].sort_values("round").groupby("method", sort=False).tail(1)
    if won.empty:
        return "No sparse network measured here wins everything: there is no **LTH-PASS** among them."
    best = ", ".join(
        f"{METHODS[m].title} ({100 * s:.1f} %)" for m, s in zip(won["method"], won["sparsity"], strict=True)
    )
    return f"**LTH-PASS**, no worse than dense in every metric measured: {best}; in brackets the highest such sparsity."


def _dimension_table(reached: pd.DataFrame, passes: pd.DataFrame) -> str:
    head = ["method", *[DIMENSIONS[name].title for name in reached], "everything"]
    lines = [head, ["---"] * len(head)]
    for method, line in reached.iterrows():
        mine = passes[passes["method"] == method].sort_values("round")
        all_of = mine[mine["passed"].cumprod().astype(bool)]["sparsity"]
        cells = [*line, all_of.iloc[-1] if len(all_of) else float("nan")]
        lines.append([METHODS[method].title, *["–" if v != v else f"{100 * v:.1f} %" for v in cells]])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _status(plans: list[PagePlan], folder: Path) -> str:
    here = compute.provenance("auto")
    lines = [
        "(status)=",
        "# Status",
        "",
        "This build:",
        "",
        *[f"- {name}: {value}" for name, value in here.items()],
        "",
        "What it took to make each page, its results being there; the commit and machine behind its numbers are named "
        "on the page itself.",
        "",
        "| page | seconds | made at (UTC) |",
        "|---|---|---|",
    ]
    for plan in plans:
        path = folder / f"{plan.path}.ipynb"
        if plan.missing:
            lines.append(f"| [{plan.title}](/{plan.file}) | missing | |")
            continue
        run = json.loads(path.read_text())["metadata"]["papermill"]
        link = f"[{plan.title}](/{plan.file})"
        lines.append(f"| {link} | {run['duration']:.1f} | {run['end_time'][:19].replace('T', ' ')} |")
    return "\n".join(lines) + "\n"


def _methods(plans: list[PagePlan]) -> str:
    """List the generated pages on each method between two comments, for the chapter on it to include."""
    parts = []
    for name, method in METHODS.items():
        if name == "dense":
            continue
        mine = [plan for plan in plans if plan.topic == ON_METHODS and plan.method == name]
        links = [
            f"- [{plan.label}](/{plan.file}), beside [all methods](/{_comparison(plans, plan).file})" for plan in mine
        ]
        none = f"{method.title} was not measured for this build: name `{name}` among the `methods` of a grid."
        found = f"{method.title} (`{name}`):\n\n" + "\n".join(links) if mine else none
        parts.append(f"<!-- {name}: begin -->\n\n{found}\n\n<!-- {name}: end -->\n")
    return "\n".join(parts)


def _comparison(plans: list[PagePlan], page: PagePlan) -> PagePlan:
    wanted = (page.grid, page.study, page.topic, COMPARISON)
    return next(p for p in plans if (p.grid, p.study, p.topic, p.method) == wanted)


def _contents(plans: list[PagePlan], template: Path) -> str:
    """Fill the table of contents: an entry ``{generated: topic}`` becomes that topic's pages."""
    toc = yaml.safe_load(template.read_text())
    for part in toc["parts"]:
        part["chapters"] = list(_filled(part["chapters"], plans))
    toc["parts"] = [part for part in toc["parts"] if part["chapters"]]  # a grid need not have every dimension
    return yaml.safe_dump(toc, sort_keys=False, allow_unicode=True)


def _filled(chapters: list[dict], plans: list[PagePlan]) -> Iterator[dict]:
    for chapter in chapters:
        if "generated" not in chapter:
            yield chapter
            continue
        mine = [plan for plan in plans if plan.topic == chapter["generated"]]
        firsts = [plan for plan in mine if plan.method == COMPARISON]
        for first in firsts:
            alike = sum(plan.label == first.label for plan in firsts) > 1
            sections = [p for p in mine if (p.grid, p.study) == (first.grid, first.study) and p is not first]
            entry = _entry(first, f"All methods: {first.label}" + f" ({first.grid})" * alike)
            if sections:
                entry["sections"] = [_entry(p, METHODS[p.method].title) for p in sections]
            yield entry


def _entry(page: PagePlan, title: str) -> dict[str, object]:
    return {"file": str(Path(page.file).with_suffix("")), "title": title + " (missing)" * bool(page.missing)}
