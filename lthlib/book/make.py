"""The steps of a grid, as ``python -m lthlib`` runs them: tickets, then pages, tables, front and book; record."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from lthlib.book import front
from lthlib.book.cost import PAPER
from lthlib.book.grid import Grid, read_grid, study_name
from lthlib.book.labs import lab_made_from, labs, make_labs
from lthlib.book.plan import (
    BUILD,
    GENERATED,
    STUB,
    Job,
    PagePlan,
    artifacts,
    every_page,
    job_made_from,
    jobs,
    page_made_from,
    put_stamp,
    stamp,
    stamped,
    tickets_of,
    vocabulary,
)
from lthlib.book.reference import reference_pages
from lthlib.book.runner import execute, made_from
from lthlib.core.errors import UserError
from lthlib.core.forks import in_forks
from lthlib.core.store import MANIFEST, ROOT, Store, say, sha256, whole_folder, write_atomically
from lthlib.core.versions import code_version, digest
from lthlib.results import overlaps
from lthlib.results.collect import COLUMNS, collect, rows_of
from lthlib.results.evaluate import DIMENSIONS, Evaluation, evaluate, question
from lthlib.results.recorded import RESULTS, check_records, recorded_json, write_records

TABLES = ("rows.csv", "costs.csv", "provenance.csv")
HTML, DOCTREES = BUILD / "html", BUILD / ".doctrees"
BEGUN = BUILD / "book-begun"  # there while Sphinx builds: what a killed build left is not built upon
FRONT, BOOK = BUILD / "stamps" / "front.json", BUILD / "stamps" / "book.json"


def tickets(grid: str, study: str, method: str, seed: int, done: Path | None = None) -> None:
    """Train and measure one method with one seed at every round of a study, then write its stamp to ``done``."""
    plan, store, job = read_grid(grid), Store(), Job(study, method, seed)
    mine = tickets_of(plan, job)
    if not mine:
        raise UserError(f"{method} with seed {seed} is not part of {study} in {grid}.")
    of = job_made_from(plan, job, store)
    for ticket in tqdm(mine, desc=f"{method}, seed {seed}", unit="ticket"):
        for dimension, parameters in plan.dimensions.items():
            evaluate(ticket, dimension, store, parameters, plan.precision)
    if done is not None:
        put_stamp(done, of)


# --- what is current ---------------------------------------------------------------------------------------------


def clear_stale(grid: Grid, store: Store) -> None:
    """Take back the stamps of whatever has to be made, or made again: what is left may be believed.

    Damaged artifacts of the store are set aside, and the jobs that made them run again; so do those whose logits are
    damaged, which the evaluations that read them outlive otherwise.

    Raises:
        UserError: Where recorded results are damaged: these cannot be made again.
    """
    for folder in sorted((ROOT / RESULTS).glob("[!.]*/")):
        check_records(folder)
    for file in sorted((ROOT / RESULTS).glob("[!.]*.json")):
        recorded_json(file)
    store.tidy()
    keys = {job: artifacts(grid, job) for job in jobs(grid)}
    lost = store.lost(_keys_of(grid, store))
    for key in [key for key in lost if key.startswith("predictions/")]:
        for evaluation in [k for of in keys.values() for k in of if k.split("/")[1] == key.split("/")[1]]:
            if evaluation.startswith("evaluations/"):
                store.drop(evaluation)  # whoever measures anew predicts anew
    made = {job: job_made_from(grid, job, store) for job in jobs(grid)}
    for job, of in made.items():
        there = all((store.path(key) / MANIFEST).exists() for key in keys[job])
        if stamped(stamp(grid, job.name)) != of or not there:
            stamp(grid, job.name).unlink(missing_ok=True)
    if stamped(BOOK) != book_made_from(grid, made) or not (HTML / "index.html").exists():
        BOOK.unlink(missing_ok=True)


def _keys_of(grid: Grid, store: Store) -> list[str]:
    """Return the keys of the store's artifacts that belong to the tickets or the data sets of a grid."""
    mine = tuple(ticket.id for study in grid.studies for ticket in study.tickets())
    shared = tuple(f"{study.data.replace('@', '+').lower()}-" for study in grid.studies)
    found = []
    for key in store.list():
        is_ticket = key.split("/")[0] in ("tickets", "evaluations", "predictions", "rewind-points")
        if f"{key.split('/')[1]}-".startswith(mine if is_ticket else shared):
            found.append(key)
    return found


def book_made_from(grid: Grid, made: Mapping[Job, str]) -> str:
    """Return the fingerprint of the built book: of all that stands in its folders, and of what should stand there."""
    files = [p for p in (ROOT / "book").rglob("*") if p.is_file() and not p.name.startswith(".")]
    read = [p for p in sorted(files) if not p.is_relative_to(ROOT / RESULTS)] + [ROOT / "_config.yml"]
    read += sorted((ROOT / "lthlib").rglob("*.py"))  # the reference shows docstrings, the labs' archive holds all
    pages = [page_made_from(page, made) for page in every_page(grid)]
    every = [*pages, *map(lab_made_from, labs()), tables_made_from(made), front_made_from(grid, made)]
    return digest([*(f"{p} {sha256(p)}" for p in read), *every])


def tables_made_from(made: Mapping[Job, str]) -> str:
    """Return the fingerprint of a grid's tables."""
    return digest([code_version(__name__), *made.values()])


def front_made_from(grid: Grid, made: Mapping[Job, str]) -> str:
    """Return the fingerprint of the front: of the grid, recorded results, contents and pages."""
    files = [
        *sorted((ROOT / RESULTS).rglob("*.json")),
        ROOT / "book" / "contents.yml",
        *(ROOT / name for name in PAPER),
    ]
    texts = [path.read_text() for path in files]
    return digest(
        [
            repr(grid),
            code_version(front.__name__),
            vocabulary(),
            *reference_pages().values(),
            *texts,
            *(page_made_from(page, made) for page in every_page(grid)),
            *made.values(),
        ]
    )


# --- the book ----------------------------------------------------------------------------------------------------


def book(grid: str, workers: int = 1) -> int:
    """Make a grid's pages, labs, tables and front, as far as they are not current, and build the book.

    Where jobs, pages or labs are missing, the book is built all the same: a stub in the place of each says why.

    Args:
        grid: The grid file.
        workers: How many pages are made at once.

    Returns:
        1 where something is missing, else 0.
    """
    plan, store = read_grid(grid), Store()
    # The stamps are believed: no image is loaded here, because a fork of a process that has run torch may stand still.
    made = {job: stamped(stamp(plan, job.name)) for job in jobs(plan)}
    undone = [job for job, of in made.items() if not of]
    BOOK.unlink(missing_ok=True)
    plans, lost = make_pages(plan, undone, made, workers), make_labs(workers)
    if not undone:
        make_tables(plan, store, tables_made_from(made))
    missing = [page for page in plans if page.missing]
    if undone or missing or stamped(FRONT) != front_made_from(plan, made):
        FRONT.unlink(missing_ok=True)
        front.write(plan, store, plans, undone, grid)
        if not undone and not missing:
            put_stamp(FRONT, front_made_from(plan, made))
    of = book_made_from(plan, made)
    log = BUILD / "logs" / "sphinx.log"
    in_forks([(log, _build)], 1)
    if log.exists():
        raise UserError(f"The book could not be built. {_last_words(log)} The whole of it: {log}")
    for page in missing:
        say(f"missing: {page.title}: {page.missing}")
    for name, reason in lost.items():
        say(f"missing: the lab on {name}: {reason}")
    if undone or missing or lost:
        return 1
    put_stamp(BOOK, of)
    return 0


def make_pages(grid: Grid, undone: list[Job], made: Mapping[Job, str], workers: int) -> list[PagePlan]:
    """Make the pages that are not current and whose jobs are done; return all, with what is missing."""
    plans = every_page(grid)
    logs = {page: BUILD / "logs" / "pages" / f"{page.path}.log" for page in plans}
    behind = {page: [job for job in undone if page.grid == grid.name and page.shows(job)] for page in plans}
    of = {page: page_made_from(page, made) for page in plans}
    for stub in GENERATED.rglob(f"*{STUB}"):
        stub.unlink()
    todo = [page for page in plans if not behind[page] and made_from(page.notebook) != of[page]]
    if todo:
        from lthlib.book import methods_page  # noqa: F401  # with it, what every page imports: the forks have it at once
    in_forks(((logs[page], _maker(page, of[page])) for page in todo), workers)
    found = []
    for page in plans:
        reason = ""
        if behind[page]:
            said = [f"{job.name}: {_last_words(job_log(grid, job))}" for job in behind[page]]
            reason = "It shows tickets that are not finished.\n" + "\n".join(said)
        elif logs[page].exists():
            reason = _last_words(logs[page])
        found.append(replace(page, missing=reason))
    return found


def _maker(page: PagePlan, of: str) -> Callable[[], None]:
    return lambda: execute(ROOT / page.template, page.notebook, page.parameters, title=page.title, of=of)


def job_log(grid: Grid, job: Job) -> Path:
    """Return where a job's output goes."""
    return BUILD / "logs" / grid.name / f"{job.name}.log"


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    said = [line.rsplit("\r", 1)[-1].strip() for line in lines]
    return next((line for line in reversed(said) if line), "it was not begun")


def _build() -> None:
    """Let Jupyter Book build; it goes on from the last build, unless that was killed."""
    from jupyter_book.cli.main import main

    if BEGUN.exists():
        for folder in (HTML, DOCTREES):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (HTML / "_generated", HTML / "_sources" / "_generated"):  # of another grid, or marks of missing pages
        shutil.rmtree(folder, ignore_errors=True)
    write_atomically(BEGUN, "")
    os.chdir(ROOT)
    toc = GENERATED / "_toc.yml"
    options = ["--config", "_config.yml", "--toc", str(toc), "--path-output", ".", "-W", "-n", "--keep-going"]
    with contextlib.suppress(SystemExit):
        main(["build", "book", *options], standalone_mode=False)
        BEGUN.unlink()
    if BEGUN.exists():
        raise UserError("Sphinx found faults, see above.")


# --- tables ------------------------------------------------------------------------------------------------------


def make_tables(grid: Grid, store: Store, of: str) -> None:
    """Write what a finished grid found: `TABLES`, unless they are current."""
    folder, mark = GENERATED / grid.name, stamp(grid, "tables")
    if stamped(mark) == of and all((folder / name).exists() for name in TABLES):
        return
    mark.unlink(missing_ok=True)
    every = list(evaluations(grid, store))
    found = [rows_of(some, dimension) for dimension, some in every], _costs(grid, store), _provenance(every)
    tables = pd.concat(found[0])[list(COLUMNS)], *found[1:]
    for name, table in zip(TABLES, tables, strict=True):
        write_atomically(folder / name, table.to_csv(index=False))
    put_stamp(mark, of)


def evaluations(grid: Grid, store: Store, without: Iterable[Job] = ()) -> Iterator[tuple[str, list[Evaluation]]]:
    """Yield each dimension with its evaluations, study by study, those of some jobs left out."""
    left_out = {(job.study, job.method, job.seed) for job in without}
    for study in grid.studies:
        mine = [t for t in study.tickets() if (study_name(study), t.method, t.seed) not in left_out]
        for dimension, parameters in grid.dimensions.items():
            yield dimension, [evaluate(t, dimension, store, parameters, grid.precision) for t in mine]


def _provenance(every: Iterable[tuple[str, list[Evaluation]]]) -> pd.DataFrame:
    """Return commit, versions, machine, precision and time behind the rows: a line a ticket and dimension.

    What the ticket was trained with has ``trained_`` in front.
    """
    lines = []
    for dimension, e in ((dimension, e) for dimension, some in every for e in some):
        trained = {f"trained_{name}": value for name, value in e.info["provenance"].items()}
        measured = {n: v for n, v in e.provenance.items() if n not in ("parameters", "n_classes")}
        lines.append({"ticket": e.ticket.id, "dimension": dimension, **measured, **trained})
    return pd.DataFrame(lines)


def _costs(grid: Grid, store: Store) -> pd.DataFrame:
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
        every = [ticket for study in plan.studies for ticket in study.tickets()]
        found[dimension] = [
            (name, evaluate(ticket, dimension, store, parameters, plan.precision))
            for ticket in tqdm(every, desc=dimension)
        ]
    shared = pd.concat([overlaps.compare(study, store) for study in plan.studies])
    folder = ROOT / RESULTS / plan.name
    with whole_folder(folder) as new:
        write_records(new, found, {overlaps.FILE: shared[list(overlaps.COLUMNS)]})
    say(f"recorded {sum(map(len, found.values()))} evaluations in {folder.relative_to(ROOT)}")
