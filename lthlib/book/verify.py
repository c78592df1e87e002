"""What of a grid has to be made, or made again, and why a run can believe the rest: looked at before each run.

The workflow's own notes are not enough (`lthlib.book.generated`). Whatever is named here is made, and what is made
of it.
"""

from __future__ import annotations

import os

from lthlib.book import front as report
from lthlib.book import generated, reproducibility
from lthlib.book.grid import Grid
from lthlib.core.store import ROOT, Store, say, unseal
from lthlib.results.evaluate import DIMENSIONS, LATENCY, Archive, question, recorded_json
from lthlib.tickets.ticket import TICKET_ID

INDEX = generated.HTML / "index.html"


def stale(grid: Grid, store: Store, *, look: bool = False) -> list[str]:
    """Return the files that the workflow has to make, relative to the checkout: absent, damaged, or of something else.

    Damaged results are set aside, and the jobs that made them are run again. So are those whose logits are damaged.
    What else the store holds of these tickets and data sets is checked, too, and made again when something needs it.

    Args:
        grid: Which.
        store: Where its results are.
        look: Change nothing: damage is seen and left where it is.

    Raises:
        UserError: Where recorded results are damaged: these cannot be made again.
    """
    for folder in sorted((ROOT / report.RESULTS).glob("[!.]*/")):
        Archive.check(folder)
    for path in (LATENCY, reproducibility.RERUNS, reproducibility.AGREEMENT):
        if path.exists():
            recorded_json(path)
    found = [str(report.done_file(grid, job).relative_to(ROOT)) for job in _undone(grid, store, look)]
    found += _generated(grid, look)
    book = generated.book_is_current(look=look)  # looked at in any case: a build goes on from what is there
    return found + [str(INDEX)] * (bool(found) or not book)


def _undone(grid: Grid, store: Store, look: bool) -> list[report.Job]:
    """Return the jobs that are not done, or whose results are lost."""
    needed = {job: _artifacts(grid, job) for job in report.jobs(grid)}
    said = {job for job in needed if _says_done(grid, job, look)}
    if not look:
        store.tidy()
    kept = _kept(grid, store)
    lost = store.check({key for job in said for key in needed[job]} | kept, set_aside=not look)
    images = {key for key in kept if key.startswith("data/")}
    if look and not lost.isdisjoint(images):
        return [*needed]  # to say more, they would have to be made again
    blind = {key.split("/")[1] for key in lost if key.startswith("predictions/")}
    for keys in needed.values():
        for key in keys:
            if key.startswith("evaluations/") and key.split("/")[1] in blind:
                if not look:
                    store.drop(key)  # whoever measures anew predicts anew
                lost.add(key)
    return [
        job
        for job, keys in needed.items()
        if job not in said or not lost.isdisjoint(keys) or _word(grid, job).get("of") != report.job_of(grid, job, store)
    ]


def _word(grid: Grid, job: report.Job) -> dict[str, object]:
    return unseal(report.done_file(grid, job))


def _says_done(grid: Grid, job: report.Job, look: bool) -> bool:
    """Say whether there is a job's word that it is done, of whatever settings, code and images."""
    file = report.done_file(grid, job)
    if not os.path.lexists(file):
        return False
    try:
        if _word(grid, job)["job"] == [job.study, job.method, job.seed]:
            return True
        fault = "it is another job's"
    except ValueError:
        fault = "it is not what was written"
    except OSError as error:
        fault = f"it cannot be read ({error.strerror})"
    say(f"damaged: {file}: {fault}; the job is gone through again")
    if not look:
        generated.remove(file)
    return False


def _generated(grid: Grid, look: bool) -> list[str]:
    """Return, of tables, pages and the front, what is not current; of files written together, the first."""
    found = []
    tables, front = ROOT / generated.FOLDER / grid.name, ROOT / generated.FOLDER
    together = [
        (tables, report.TABLES, report.tables_of(grid)),
        (front, report.front_files(grid), report.front_of(grid)),
        *((front, [f"{page.path}.ipynb"], report.page_of(grid, page)) for page in report.every_page(grid)),
    ]
    for folder, names, of in together:
        wrong = [name for name in names if not generated.is_current(folder / name, of, look=look)]
        if wrong:
            found.append(str((folder / names[0]).relative_to(ROOT)))
    return found


def _artifacts(grid: Grid, job: report.Job) -> list[str]:
    """Return the keys of what a job leaves in the store for rows and pages."""
    questions = [
        question(name, DIMENSIONS[name].parameters(parameters), grid.precision)
        for name, parameters in grid.dimensions.items()
    ]
    return [
        key
        for ticket in report.tickets_of(grid, job)
        for key in (f"tickets/{ticket.id}", *(f"evaluations/{ticket.id}/{name}" for name in questions))
    ]


def _kept(grid: Grid, store: Store) -> set[str]:
    """Return the keys of what the store holds of a grid's tickets and data sets: logits, images, rewind points."""
    mine = {ticket.id for study in grid.studies for ticket in study.tickets()}
    shared = tuple(f"{study.data.replace('@', '+').lower()}-" for study in grid.studies)
    found = set()
    for key in store.list():
        name = key.split("/")[1]
        ticket = TICKET_ID.match(name)
        if ticket[0] in mine if ticket else f"{name}-".startswith(shared):
            found.add(key)
    return found
