"""The steps of a grid, as ``python -m lthlib`` runs them: tickets, then pages, tables, front and book; record."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from tqdm import tqdm

from lthlib import figures
from lthlib.book import front, plan
from lthlib.book.cost import PAPER
from lthlib.book.grid import Grid, read_grid
from lthlib.book.labs import example_made_from, lab_made_from, labs, make_labs
from lthlib.book.runner import execute, made_from
from lthlib.core import lifeline, machine
from lthlib.core.errors import UserError
from lthlib.core.forks import in_forks, last_line
from lthlib.core.store import MANIFEST, ROOT, Store, say, sha256, write_atomically
from lthlib.core.versions import code_version, digest, modules_of
from lthlib.results import overlaps
from lthlib.results.collect import COLUMNS, rows_of, ticket_table
from lthlib.results.evaluate import DIMENSIONS, Evaluation, evaluate, evaluation_key, question
from lthlib.results.recorded import RESULTS, check_records, read_records, recorded_json, write_records

HTML, DOCTREES = plan.BUILD / "html", plan.BUILD / ".doctrees"
BEGUN = plan.BUILD / "book-begun"  # there while Sphinx builds: what a killed build left is not built upon
BOOK = plan.BUILD / "stamps" / "book.json"


def tickets(grid: str, study: str, method: str, seed: int, done: Path | None = None) -> None:
    """Train and measure one method with one seed at every round of a study, then write its stamp to ``done``."""
    asked, store, job = read_grid(grid), Store(), plan.Job(study, method, seed)
    mine = plan.tickets_of(asked, job)
    if not mine:
        raise UserError(f"{method} with seed {seed} is not part of {study} in {grid}.")
    of = plan.job_made_from(asked, job, store)
    machine.keep_memory()
    for ticket in tqdm(mine, desc=f"{method}, seed {seed}", unit="ticket"):
        for dimension, parameters in asked.dimensions.items():
            evaluate(ticket, dimension, store, parameters, asked.precision)
    if done is not None:
        plan.put_stamp(done, of)


# --- what is current ---------------------------------------------------------------------------------------------


def clear_stale(grid: Grid, store: Store) -> None:
    """Take back the stamps of whatever has to be made, or made again: what is left may be believed.

    Damaged artifacts of the store are set aside, and the jobs that made them run again; so do those whose logits are
    damaged, which the evaluations that read them outlive otherwise. Damage to recorded results, which cannot be made
    again, is an error.
    """
    for folder in sorted((ROOT / RESULTS).glob("[!.]*/")):
        check_records(folder)
    for file in sorted((ROOT / RESULTS).glob("[!.]*.json")):
        recorded_json(file)
    keys = {job: plan.artifacts(grid, job) for job in plan.jobs(grid)}
    lost = store.lost(_keys_of(grid, store))
    unread = tuple(f"evaluations/{key.split('/')[1]}/" for key in lost if key.startswith("predictions/"))
    for key in [key for of in keys.values() for key in of if key.startswith(unread)]:
        store.drop(key)  # whoever measures anew predicts anew
    made = {job: plan.job_made_from(grid, job, store) for job in plan.jobs(grid)}
    for job, of in made.items():
        there = all((store.path(key) / MANIFEST).exists() for key in keys[job])
        if plan.stamped(plan.stamp(grid, job.name)) != of or not there:
            plan.stamp(grid, job.name).unlink(missing_ok=True)
    if plan.stamped(BOOK) != book_made_from(grid, made) or not (HTML / "index.html").exists():
        BOOK.unlink(missing_ok=True)


def _keys_of(grid: Grid, store: Store) -> list[str]:
    """Return the keys of the store's artifacts that belong to the tickets or the data sets of a grid."""
    mine = tuple(ticket.id for study in grid.studies for ticket in study.tickets())
    shared = tuple(f"{study.data.replace('@', '+').lower()}-" for study in grid.studies)
    of = dict.fromkeys(("tickets", "evaluations", "predictions", "rewind-points"), mine)
    named = ((key, *key.split("/")[:2]) for key in store.list())
    return [key for key, kind, name in named if f"{name}-".startswith(of.get(kind, shared))]


def book_made_from(grid: Grid, made: Mapping[plan.Job, str]) -> str:
    """Return the fingerprint of the built book: of all that stands in its folders, and of what should stand there."""
    files = [p for p in sorted((ROOT / "book").rglob("*")) if p.is_file() and not p.name.startswith(".")]
    files += [ROOT / name for name in ("_config.yml", *PAPER)]
    files += sorted((ROOT / "lthlib").rglob("*.py"))  # the reference shows docstrings, the labs' archive holds all
    pages = [plan.page_made_from(page, made) for page in plan.every_page(grid)]
    shown = [repr(grid), plan.vocabulary(), *made.values(), *pages, *map(lab_made_from, labs()), example_made_from()]
    return digest([*(f"{p} {sha256(p)}" for p in files), *shown])


# --- the book ----------------------------------------------------------------------------------------------------


def book(grid: str, workers: int = 1) -> int:
    """Make a grid's pages and labs, as far as they are not current, then its tables and front, and build the book.

    Where jobs, pages or labs are missing, the book is built all the same: a stub in the place of each says why, and 1
    is returned.
    """
    asked, store = read_grid(grid), Store()
    # The stamps are believed: no image is loaded here, because a fork of a process that has run torch may stand still.
    made = {job: plan.stamped(plan.stamp(asked, job.name)) for job in plan.jobs(asked)}
    undone = [job for job, of in made.items() if not of]
    BOOK.unlink(missing_ok=True)
    plans, lost = make_pages(asked, undone, made, workers), make_labs(workers)
    if not undone:
        make_tables(asked, store)
    missing = [page for page in plans if page.missing]
    front.write(asked, store, plans, undone, grid, workers)
    of = book_made_from(asked, made)
    logs = plan.BUILD / "logs"
    for said in in_forks({"sphinx": functools.partial(_build, workers)}, logs, 1).values():
        raise UserError(f"The book could not be built. {said} The whole of it: {logs / 'sphinx.log'}")
    for page in missing:
        say(f"missing: {page.title}: {page.missing}")
    for name, reason in lost.items():
        say(f"missing: {name}: {reason}")
    if undone or missing or lost:
        return 1
    plan.put_stamp(BOOK, of)
    return 0


def make_pages(grid: Grid, undone: list[plan.Job], made: Mapping[plan.Job, str], workers: int) -> list[plan.PagePlan]:
    """Make the pages that are not current and whose jobs are done; return all, with what is missing."""
    plans = plan.every_page(grid)
    behind = {page: [job for job in undone if page.grid == grid.name and page.shows(job)] for page in plans}
    of = {page: plan.page_made_from(page, made) for page in plans}
    for stub in plan.GENERATED.rglob(f"*{plan.STUB}"):
        stub.unlink()
    todo = [page for page in plans if not behind[page] and made_from(page.notebook) != of[page]]
    if todo:
        prepare()
    tasks = {page.path: functools.partial(_make, page, of[page]) for page in todo}
    missing = in_forks(tasks, plan.BUILD / "logs" / "pages", workers)
    for page in filter(behind.get, plans):
        said = [f"{job.name}: {last_line(job_log(grid, job))}" for job in behind[page]]
        missing[page.path] = "It shows tickets that are not finished.\n" + "\n".join(said)
    return [replace(page, missing=missing.get(page.path, "")) for page in plans]


def prepare() -> None:
    """Do here what each page would do first, so that the forks have it: imports, versions of code, records, fonts."""
    from lthlib.book import methods_page  # noqa: F401  # with it, what every page imports

    read_records(ROOT / RESULTS)

    code_version(*(module for room in ("data", "pruning", "tickets", "metrics") for module in modules_of(room)))
    for dimension in DIMENSIONS.values():
        dimension.measure()
    figures.use_style()
    figures.png(figures.power_curves(pd.DataFrame({"loss": [0.0, 2.0], "seeds": 1, "images": 1, "kept": 1.0})))
    plt.close("all")
    gc.freeze()  # what is here by now lives as long as the forks: their collectors need not look through it


def _make(page: plan.PagePlan, of: str) -> None:
    execute(ROOT / page.template, page.notebook, page.parameters, title=page.title, of=of)


def job_log(grid: Grid, job: plan.Job) -> Path:
    """Return where a job's output goes."""
    return plan.BUILD / "logs" / grid.name / f"{job.name}.log"


def _build(workers: int) -> None:
    """Let Jupyter Book build; it goes on from the last build, unless that was killed."""
    from jupyter_book.sphinx import build_sphinx  # its command builds on one core

    if BEGUN.exists():
        for folder in (HTML, DOCTREES):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (HTML / "_generated", HTML / "_sources" / "_generated"):  # of another grid, or marks of missing pages
        shutil.rmtree(folder, ignore_errors=True)
    write_atomically(BEGUN, "")
    os.register_at_fork(after_in_child=lifeline.watch)
    toc = {"external_toc_path": str(plan.GENERATED / "_toc.yml"), "latex_individualpages": False, "nitpicky": True}
    options = {"noconfig": True, "path_config": ROOT / "_config.yml", "confoverrides": toc, "jobs": workers}
    if build_sphinx(ROOT / "book", HTML, warningiserror=True, keep_going=True, **options) != 0:
        raise UserError("Sphinx found faults, see above.")
    BEGUN.unlink()


# --- tables ------------------------------------------------------------------------------------------------------


def make_tables(grid: Grid, store: Store) -> None:
    """Write what a finished grid found: ``rows.csv``, ``costs.csv`` and ``provenance.csv``."""
    every = [pair for study in grid.studies for pair in front.measured(grid, study, store).items()]
    rows = pd.concat([rows_of(found, name) for name, found in every])[list(COLUMNS)]
    costs = _costs([e for name, found in every if name == every[0][0] for e in found])  # the same in every dimension
    for name, table in (("rows", rows), ("costs", costs), ("provenance", _provenance(every))):
        write_atomically(plan.GENERATED / grid.name / f"{name}.csv", table.to_csv(index=False))


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


def _costs(evaluations: Sequence[Evaluation]) -> pd.DataFrame:
    """Return what each ticket costs: its counts, bytes, trainings and seconds, a line a ticket."""
    found = ticket_table(evaluations).drop(columns="density_by_layer")
    found = found.assign(dataset=[e.ticket.data for e in evaluations], arch=[e.ticket.arch for e in evaluations])
    which = ["dataset", "arch", "method", "round", "seed", "ticket"]
    return found[[*which, *found.columns.drop(which)]]


def record(grid: str, so_far: bool = False) -> None:
    """Put a grid's results into ``book/results/<grid>``, computing what is missing, or ``so_far`` what there is.

    What was recorded there before, and is not in the store, stays: a study may be run in pieces, on several machines.
    """
    asked, store = read_grid(grid), Store()
    folder = ROOT / RESULTS / asked.name
    known = functools.cache(lambda: {key: r for key, r in read_records(ROOT / RESULTS).items() if r.folder == folder})
    every = [ticket for study in asked.studies for ticket in study.tickets()]
    found = {}
    for dimension, parameters in asked.dimensions.items():
        settings, found[dimension] = DIMENSIONS[dimension].parameters(parameters), []
        name = question(dimension, settings, asked.precision)
        for ticket in tqdm(every, desc=dimension):
            here = store.path(evaluation_key(ticket, dimension, settings, asked.precision)).exists()
            before = None if here else known().get((ticket.id, name))
            if so_far and not here and not before:
                continue
            of = before.evaluation(ticket) if before else evaluate(ticket, dimension, store, settings, asked.precision)
            found[dimension].append((name, of))
    if not all(found.values()):
        raise UserError(f"Nothing of {asked.name} is measured so far in {', '.join(d for d in found if not found[d])}.")
    shared = _overlaps(asked, store, folder, {of.ticket.id for pairs in found.values() for _, of in pairs})
    new, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    for left in (new, old):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    write_records(new, found, {overlaps.FILE: shared})
    if folder.exists():
        os.replace(folder, old)  # at no time is there a part of a record
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)
    say(f"recorded {sum(map(len, found.values()))} evaluations in {folder.relative_to(ROOT)}")


def _overlaps(grid: Grid, store: Store, folder: Path, among: Collection[str]) -> pd.DataFrame:
    """Return the overlaps of all pairs ``among`` some tickets: of masks in the store, and of others as recorded before.

    Of networks that were trained on two machines the masks have never met: there it is NaN.
    """
    here = {ticket for ticket in among if store.path(f"tickets/{ticket}").exists()}
    found = [overlaps.compare(study, store, among=here) for study in grid.studies]
    if (folder / overlaps.FILE).exists():
        before = pd.read_csv(folder / overlaps.FILE)
        found.append(before[~(before["first"].isin(here) & before["second"].isin(here))])
    told = pd.concat(found, ignore_index=True)[list(overlaps.COLUMNS)]
    known = set(map(frozenset, zip(told["first"], told["second"], strict=True)))
    pairs = [
        (a.id, b.id)
        for study in grid.studies
        for round, seed in itertools.product(study.rounds, study.seeds)
        for a, b in overlaps.pairs(study, round, seed)
        if {a.id, b.id} <= {*among}
    ]
    unknown = pd.DataFrame([pair for pair in pairs if frozenset(pair) not in known], columns=["first", "second"])
    return pd.concat([told, unknown], ignore_index=True) if len(unknown) else told
