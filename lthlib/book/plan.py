"""What a grid is made of, in files: jobs that train and measure, pages that show; and what each is made from.

A *fingerprint* says what something is made from: settings, code, images, what it stands on. A *stamp* is a small file
that says something was made whole, from which fingerprint. Where the fingerprint is another one today, the stamp goes,
and Snakemake, which looks only whether stamps are there, makes it again. No date of any file decides anything.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lthlib import data
from lthlib.book.grid import ON_METHODS, Grid, read_grid, study_name
from lthlib.core.errors import UserError
from lthlib.core.store import MANIFEST, ROOT, Store, seal, unseal, write_atomically
from lthlib.core.versions import code_version, digest, imported
from lthlib.data.corruptions import CORRUPTIONS
from lthlib.metrics import METRICS
from lthlib.networks import ARCHITECTURES
from lthlib.pruning import METHODS
from lthlib.results.evaluate import DIMENSIONS, evaluation_key
from lthlib.results.recorded import LATENCY, RESULTS, read_records
from lthlib.tickets.obtain import version_of
from lthlib.tickets.study import Study
from lthlib.tickets.subject import Subject
from lthlib.tickets.ticket import Ticket

GENERATED = ROOT / "book" / "_generated"
BUILD = ROOT / "_build"
COMPARISON = "comparison"
STUB = "-missing.md"
TOPICS = {name: dimension.title for name, dimension in DIMENSIONS.items()} | {ON_METHODS: "Methods"}


def stamp(grid: Grid, name: str) -> Path:
    """Return the file that says that a job of a grid is made."""
    return BUILD / "stamps" / grid.name / f"{name}.json"


def put_stamp(path: Path, of: str) -> None:
    """Say that something is made whole."""
    write_atomically(path, seal({"of": of}))


def stamped(path: Path) -> str:
    """Return the fingerprint that a stamp tells; empty where there is no whole stamp."""
    try:
        return str(unseal(path)["of"])
    except (OSError, ValueError, KeyError):
        return ""


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

    @property
    def is_chain(self) -> bool:
        """Whether each of its rounds builds on the one before: begun last, it would keep one core busy alone."""
        return METHODS[self.method].source == "previous"


def jobs(grid: Grid) -> list[Job]:
    """Return a grid's jobs, study by study, dense first."""
    return [
        Job(study_name(study), method, seed)
        for study in grid.studies
        for method in ("dense", *study.methods)
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


def tickets_of(grid: Grid, job: Job) -> list[Ticket]:
    """Return the tickets of a job, round by round."""
    every = grid.study(job.study).tickets()
    return [ticket for ticket in every if ticket.method == job.method and ticket.seed == job.seed]


def job_made_from(grid: Grid, job: Job, store: Store) -> str:
    """Return the fingerprint of a job: it changes when any of its results would be made anew. It needs the images."""
    mine = tickets_of(grid, job)
    subject = Subject(mine[0], store, grid.precision)
    measured = [
        DIMENSIONS[name].version(subject, DIMENSIONS[name].parameters(given)) for name, given in grid.dimensions.items()
    ]
    return digest([*artifacts(grid, job), *(version_of(ticket, subject.data) for ticket in mine), *measured])


def artifacts(grid: Grid, job: Job) -> list[str]:
    """Return the keys of what a job leaves in the store: tickets, and their evaluations."""
    settings = {name: DIMENSIONS[name].parameters(given) for name, given in grid.dimensions.items()}
    return [
        key
        for ticket in tickets_of(grid, job)
        for key in (
            f"tickets/{ticket.id}",
            *(evaluation_key(ticket, name, given, grid.precision) for name, given in settings.items()),
        )
    ]


# --- pages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
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
    def path(self) -> str:
        """Path below ``book/_generated``, without suffix."""
        return f"{self.grid}/{self.study}/{self.topic}/{self.method}"

    @property
    def file(self) -> str:
        """What the book shows of it, relative to ``book``: the notebook, or where that is missing a stub."""
        return f"_generated/{self.path}" + (STUB if self.missing else ".ipynb")

    @property
    def notebook(self) -> Path:
        """Where it is made."""
        return GENERATED / f"{self.path}.ipynb"

    @property
    def template(self) -> str:
        """The notebook it is made from, relative to the checkout."""
        return f"notebooks/{self.topic}.ipynb"

    def shows(self, job: Job) -> bool:
        """Say whether it shows the tickets of a job of its grid."""
        return job.study == self.study and job.method in ("dense", *self.parameters["method"])


def pages(grid: Grid, *, from_record: bool = False) -> list[PagePlan]:
    """Return the pages of a grid: for each study and topic the comparison, and where asked for a page a method.

    Pages ``from_record`` show recorded results and compute nothing.
    """
    return [
        _page(grid, study, topic, method, from_record)
        for study in grid.studies
        for topic in (*grid.dimensions, ON_METHODS)
        for method in (COMPARISON, *(study.methods if topic in grid.method_pages else ()))
    ]


def _page(grid: Grid, study: Study, topic: str, method: str, from_record: bool) -> PagePlan:
    about = METHODS[method].title if method != COMPARISON else "all methods"
    shown, dimension, more = method, topic, {}
    if topic == ON_METHODS:
        # A method is seen beside the others; any dimension's results hold tickets and accuracy.
        shown, dimension = COMPARISON, min(grid.dimensions, key=lambda name: name != "generalization")
        more = {"dimension": dimension, "about": method if method != COMPARISON else None}
    settings = json.loads(json.dumps(asdict(study)))  # a notebook's parameters know no tuples
    every = settings.pop("methods")
    methods = every if shown == COMPARISON else [shown]
    settings |= {
        "method": methods,
        "options": {name: options for name, options in settings["options"].items() if name in methods},
        "measure": dict(grid.dimensions[dimension]),
        "thresholds": dict(grid.thresholds),
        "precision": grid.precision,
        "recorded": RESULTS if from_record else None,
        "compute_missing": not from_record,
        **more,
    }
    known = data.title_of(study.data)
    label = f"{known}, {ARCHITECTURES[study.arch].title}"
    title = f"{TOPICS[topic]}: {about} on {label}"
    return PagePlan(grid.name, study_name(study), topic, method, label, title, settings)


def every_page(grid: Grid) -> list[PagePlan]:
    """Return the pages of the book of a grid: its own, and those of recorded results."""
    return pages(grid) + [page for other in recorded_grids(grid.name) for page in pages(other, from_record=True)]


def page_made_from(page: PagePlan, jobs_made_from: Mapping[Job, str]) -> str:
    """Return the fingerprint of a page: results (those of the run's jobs), template, parameters, title, code, words."""
    if page.parameters["compute_missing"]:
        results = [of for job, of in jobs_made_from.items() if page.shows(job)]
    else:
        results = [(ROOT / RESULTS / page.grid / MANIFEST).read_text()]
    latency = LATENCY.read_text() if page.topic == ON_METHODS and LATENCY.exists() else ""
    settings = json.dumps([page.parameters, page.title], sort_keys=True)
    return digest([settings, template_made_from(page.template), vocabulary(), latency, *results])


@functools.cache
def template_made_from(name: str) -> str:
    """Return a template's text and the version of the code that it imports."""
    text = (ROOT / name).read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return text + code_version(*imported("\n".join("".join(cell["source"]) for cell in cells)))


@functools.cache
def vocabulary() -> str:
    """Return a hash of what tables and figures say of things: names, directions, units, definitions, who has a vote."""
    said = [*METRICS.values()]
    said += [(m.name, m.title, m.family, m.reference, m.paper, m.source) for m in METHODS.values()]
    said += [(name, s.title, s.ood) for name, s in data.DATASETS.items()]
    said += [(entry.name, entry.title) for entry in (*DIMENSIONS.values(), *ARCHITECTURES.values())]
    said += [(c.name, c.title, c.group) for c in CORRUPTIONS.values()]
    return digest(map(repr, said))


@functools.cache
def recorded_grids(but: str) -> list[Grid]:
    """Return the grids of all recorded results, except the one of a name.

    Its dimensions are those of its results; its methods and seeds are those of which all is recorded, see `_so_far`.
    """
    found, records = [], read_records(ROOT / RESULTS)
    for folder in sorted(p.parent for p in (ROOT / RESULTS).glob(f"[!.]*/{MANIFEST}")):
        path = ROOT / "workflow" / "grids" / f"{folder.name}.yml"
        if folder.name == but:
            continue
        if not path.exists():
            raise UserError(f"{folder} holds recorded results of a grid that has no file {path}.")
        grid = read_grid(path, recorded=True)
        held = {name: of for name, of in grid.dimensions.items() if (folder / f"{name}.json.gz").exists()}
        times = Counter(ticket for (ticket, _), record in records.items() if record.folder == folder)
        known = {ticket for ticket, n in times.items() if n == len(held)}  # others were stopped while measured
        studies = tuple(_so_far(study, known) for study in grid.studies)
        lacking = sum(len(a.tickets()) - len(b.tickets()) for a, b in zip(grid.studies, studies, strict=True))
        found.append(replace(grid, studies=studies, dimensions=held, lacking=lacking))
    return found


def _so_far(study: Study, recorded: Collection[str]) -> Study:
    """Return the part of a study that is recorded whole: methods with its first seed, and seeds with all of these."""
    tickets = study.tickets()
    lacking = {(ticket.method, ticket.seed) for ticket in tickets if ticket.id not in recorded}
    methods = tuple(name for name in study.methods if (name, study.seeds[0]) not in lacking)
    seeds = tuple(seed for seed in study.seeds if not lacking & {(name, seed) for name in ("dense", *methods)})
    return replace(study, methods=methods, seeds=seeds) if methods and seeds else study  # whose pages say what lacks
