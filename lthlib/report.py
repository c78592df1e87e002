"""A grid's way into the book: its jobs, its pages, its tables, the front page.

The functions named like commands (`tickets`, `rows`, `front`, `record`) are what ``python -m lthlib`` runs.
"""

from __future__ import annotations

import io
import json
import os
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import yaml
from tqdm import tqdm

from lthlib import compute, data, estimate, generated, overlaps, reproducibility, verdict
from lthlib.code_version import code_version
from lthlib.corruptions import CORRUPTIONS
from lthlib.errors import UserError
from lthlib.evaluate import (
    COLUMNS,
    DIMENSIONS,
    LATENCY,
    Archive,
    Evaluation,
    collect,
    evaluate,
    question,
    recorded_json,
    rows_of,
)
from lthlib.grid import ON_METHODS, Grid, read_grid, study_name
from lthlib.models import ARCHITECTURES
from lthlib.pruners import METHODS
from lthlib.store import ROOT, Store, say, seal, unseal, write_atomically
from lthlib.study import Study
from lthlib.tickets import TICKET_ID, Ticket, obtain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "book/results"
COMPARISON = "comparison"
STUB = "-missing.md"
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


def job_version(grid: Grid, job: Job) -> str:
    """Return a hash of the code behind a job's tickets and evaluations; another one means: run it again."""
    method, study = METHODS[job.method], grid.study(job.study)
    functions = [obtain, evaluate, method.find, ARCHITECTURES[study.arch].build]
    functions += [method.during] if method.during else []
    functions += [DIMENSIONS[name].measure() for name in grid.dimensions]
    functions += [corruption.function for corruption in CORRUPTIONS.values()] + list(data.OOD.values())
    return code_version(*functions)


def job_settings(grid: Grid, job: Job) -> str:
    """Return everything of the grid that a job depends on, as text."""
    study = asdict(grid.study(job.study))
    study["options"] = study["options"].get(job.method, {})
    del study["methods"], study["seeds"]
    return json.dumps([study, grid.dimensions, grid.precision], sort_keys=True, default=list)


def done_file(grid: Grid, job: Job) -> Path:
    """Return the file that says, in this checkout, that a job is done."""
    return ROOT / "_build" / "jobs" / grid.name / f"{job.name}.json"


def rows_file(grid: Grid) -> Path:
    """Return the tidy table of a finished grid."""
    return ROOT / generated.FOLDER / grid.name / "rows.csv"


def verify(grid: Grid, store: Store) -> None:
    """Check what a grid's rows and pages stand on, for the workflow sees only whether files are newer than others.

    Damaged results are set aside, and the jobs that made them lose the file that says they are done: they run again,
    and whatever is made of them. So do those whose logits are damaged. What else the store holds of these tickets and
    data sets is checked, too, and made again when something needs it. A job that is not done, for its run was killed,
    takes the table of rows with it: beside a whole table and a whole book, the workflow would not miss it.

    Raises:
        UserError: Where recorded results are damaged: these cannot be made again.
    """
    for folder in sorted((ROOT / RESULTS).glob("[!.]*/")):
        Archive.check(folder)
    for path in (LATENCY, reproducibility.RERUNS, reproducibility.AGREEMENT):
        if path.exists():
            recorded_json(path)
    generated.check()
    needed = {job: _artifacts(grid, job) for job in jobs(grid)}
    finished = [job for job in needed if _is_done(grid, job)]
    store.tidy()
    lost = store.check({key for job in finished for key in needed[job]} | _kept(grid, store))
    blind = {key.split("/")[1] for key in lost if key.startswith("predictions/")}
    for job, keys in needed.items():
        for key in keys:
            if key.startswith("evaluations/") and key.split("/")[1] in blind:
                store.drop(key)  # whoever measures anew predicts anew
                lost.add(key)
        if not done_file(grid, job).exists() or (job in finished and not lost.isdisjoint(keys)):
            _run_again(grid, job)


def _is_done(grid: Grid, job: Job) -> bool:
    """Say whether a job left word that it is done; word that is damaged, or another job's, is taken back.

    A job that was done with other settings is not done. Its word stays: the workflow sees by itself that they changed,
    and where they are changed back, nothing has to run.
    """
    file = done_file(grid, job)
    if not os.path.lexists(file):
        return False
    try:
        found, settings = unseal(file), job_settings(grid, job)
        if found["job"] == [job.study, job.method, job.seed]:
            return found.get("settings", settings) == settings
        fault = "it is another job's"
    except ValueError:
        fault = "it is not what was written"
    except OSError as error:
        fault = f"it cannot be read ({error.strerror})"
    say(f"damaged: {file}: {fault}; the job is gone through again")
    _run_again(grid, job)
    return False


def _run_again(grid: Grid, job: Job) -> None:
    """Let the workflow run a job again, and whatever is made of it."""
    for file in (done_file(grid, job), rows_file(grid)):  # a job runs again only where something lacks it
        generated.remove(file)


def _artifacts(grid: Grid, job: Job) -> list[str]:
    """Return the keys of what a job leaves in the store for rows and pages."""
    questions = [
        question(name, DIMENSIONS[name].parameters(parameters), grid.precision)
        for name, parameters in grid.dimensions.items()
    ]
    return [
        key
        for ticket in _tickets_of(grid, job)
        for key in (f"tickets/{ticket.id}", *(f"evaluations/{ticket.id}/{name}" for name in questions))
    ]


def _kept(grid: Grid, store: Store) -> set[str]:
    """Return the keys of what the store holds of a grid's tickets and data sets: logits, images, rewind points."""
    mine = {ticket.id for study in grid.studies for ticket in study.tickets()}
    shared = tuple(study.data.replace("@", "+").lower() for study in grid.studies)
    found = set()
    for key in store.list():
        name = key.split("/")[1]
        ticket = TICKET_ID.match(name)
        if ticket[0] in mine if ticket else name.startswith(shared):
            found.add(key)
    return found


def _tickets_of(grid: Grid, job: Job) -> list[Ticket]:
    every = grid.study(job.study).tickets()
    return [ticket for ticket in every if ticket.method == job.method and ticket.seed == job.seed]


def tickets(grid: str, study: str, method: str, seed: int, done: Path | None = None) -> None:
    """Train and measure one method with one seed at every round of a study, then write ``done``."""
    plan, store = read_grid(grid), Store()
    mine = _tickets_of(plan, Job(study, method, seed))
    if not mine:
        raise UserError(f"{method} with seed {seed} is not part of {study} in {grid}.")
    for ticket in tqdm(mine, desc=f"{method}, seed {seed}", unit="ticket"):
        for dimension, parameters in plan.dimensions.items():
            evaluate(ticket, dimension, store, parameters, plan.precision)
    if done is not None:
        word = {"job": [study, method, seed], "settings": job_settings(plan, Job(study, method, seed))}
        write_atomically(done, seal({**word, "tickets": [ticket.id for ticket in mine]}))


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
            measuring = 4 * len(_tickets_of(grid, job))
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


def recorded_grids(but: str) -> list[Grid]:
    """Return the grids of all recorded results, except the one of a name.

    Where a grid asks for all methods, these are the methods of its results, not those added since.
    """
    found, archive = [], Archive.read(ROOT / RESULTS)
    for folder in sorted(p.parent for p in (ROOT / RESULTS).glob("*/manifest.json")):
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


def table(
    grid: Grid, store: Store, *, from_record: bool = False, without: Iterable[Job] = ()
) -> pd.DataFrame:
    """Return every number of a grid as one tidy table, with ``round`` beside `lthlib.evaluate.COLUMNS`.

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


def rows(grid: str, file: Path) -> None:
    """Write the tidy table of a finished grid, and beside it ``costs.csv`` and ``provenance.csv``."""
    plan, store = read_grid(grid), Store()
    every = list(evaluations(plan, store))
    tables = {
        "costs.csv": costs(plan, store),
        "provenance.csv": provenance(every),
        file.name: pd.concat([rows_of(found, dimension) for dimension, found in every])[list(COLUMNS)],
    }
    for name, found in tables.items():
        generated.write(file.with_name(name), found.to_csv(index=False))


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
            (name, evaluate(t, dimension, store, parameters, plan.precision))
            for t in tqdm(every, desc=dimension)
        ]
    folder = ROOT / RESULTS / plan.name
    shared = pd.concat([overlaps.compare(study, store) for study in plan.studies])
    Archive.write(folder, found, {overlaps.FILE: shared[list(overlaps.COLUMNS)]})
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
    others = recorded_grids(plan.name)
    undone = [job for job in jobs(plan) if unfinished and not done_file(plan, job).exists()]
    sections = [_answer(plan, table(plan, store, without=undone), folder, undone)]
    sections += [_answer(other, table(other, store, from_record=True), folder) for other in others]
    generated.write(folder / "answer.md", "\n\n".join(sections) + "\n")
    plans = pages(plan) + [page for other in others for page in pages(other, from_record=True)]
    for stub in folder.rglob(f"*{STUB}"):
        stub.unlink()
    if unfinished:
        plans = [replace(page, missing=_why_missing(plan, page, undone, folder)) for page in plans]
    for page in plans:
        if page.missing:
            generated.write(folder.parent / page.file, _stub(page, grid))
    generated.write(folder / "status.md", _status(plans, folder))
    generated.write(folder / "methods.md", _methods(plans))
    generated.write(folder / "cost.md", estimate.chapter_table())
    for name, text in reproducibility.chapter_tables().items():
        generated.write(folder / name, text)
    generated.write(folder / "_toc.yml", _contents(plans, ROOT / "book" / "contents.yml"))


def _why_missing(grid: Grid, page: PagePlan, undone: Iterable[Job], folder: Path) -> str:
    """Return why a page is missing, in the words of the log of what failed; empty where it is there."""
    behind = [
        job
        for job in undone
        if page.grid == grid.name and (job.study, job.method in page.shown) == (page.study, True)
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
    alone = [".venv/bin/python", "-m", "lthlib.execute", page.template, output, "--title", page.title]
    alone += ["--parameters", json.dumps(page.parameters)]
    return (
        f"# {page.title}\n\n```{{warning}}\nThis page is missing: it could not be made.\n```\n\n"
        f"`````text\n{page.missing}\n`````\n\n"
        "Make it again, with everything else that is missing:\n\n"
        f"```bash\nmake report GRID={shlex.quote(grid)}\n```\n\n"
        f"Or alone, to look for the fault:\n\n`````bash\n{shlex.join(alone)}\n`````\n"
    )


def _answer(grid: Grid, found: pd.DataFrame, folder: Path, undone: Collection[Job] = ()) -> str:
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
        classes = len(data.load(study.data, Store()).classes) if _is_here(study) else _recorded_classes(mine)
        judged = verdict.regions(mine, classes, verdict.Thresholds(**grid.thresholds))
        reached = verdict.reach(judged)
        picture = f"answer-{grid.name}-{study_name(study)}.svg"
        _draw(figures.reach_map(reached), folder / picture)
        passes = verdict.lth_pass(judged)
        caption = (
            "How far each method keeps each metric: the highest sparsity (in percent) up to which it wins without a "
            "break; – where it loses at once."
        )
        parts += [_passes(passes), f"```{{figure}} /_generated/{picture}\n:width: 100%\n{caption}\n```"]
        parts += [_dimension_table(verdict.reach(judged, by="dimension"), passes)]
        parts += [_scorecard(mine, judged, folder, f"scorecard-{grid.name}-{study_name(study)}.svg")]
        parts += [f"{mine['ticket'].nunique()} tickets, seeds {', '.join(map(str, study.seeds))}."]
    return "\n\n".join(parts)


def _draw(figure: Figure, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", bbox_inches="tight")
    generated.write(path, drawn.getvalue())


def _scorecard(mine: pd.DataFrame, judged: pd.DataFrame, folder: Path, picture: str) -> str:
    """Draw the paper's first figure of one study, folded away."""
    from lthlib import figures

    n = verdict.standing_round(judged)
    shown = mine[(mine["round"] == n) | (mine["method"] == "dense")]
    _draw(figures.radar(verdict.scorecard(verdict.summarise(shown))), folder / picture)
    sparsity = judged.loc[judged["round"] == n, "sparsity"].mean()
    caption = (
        f"Each metric of the paper at {100 * sparsity:.1f} % sparsity, scaled so that the best network shown is at the "
        "rim and the worst in the centre, whatever lies between them ([](#how-to-read))."
    )
    figure = f"```{{figure}} /_generated/{picture}\n:width: 100%\n{caption}\n```"
    return f"````{{dropdown}} At one sparsity, as the paper's first figure has it\n{figure}\n````"


def _is_here(study: Study) -> bool:
    try:
        data.load(study.data, Store())
    except UserError:
        return False
    return True


def _recorded_classes(mine: pd.DataFrame) -> int:
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
        "(status)=", "# Status", "",
        "This build:", "", *[f"- {name}: {value}" for name, value in here.items()], "",
        "What it took to make each page, its results being there; the commit and machine behind its numbers are named "
        "on the page itself.", "",
        "| page | seconds | made at (UTC) |", "|---|---|---|",
    ]  # fmt: skip
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
            f"- [{plan.label}](/{plan.file}), beside [all methods](/{_comparison(plans, plan).file})"
            for plan in mine
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
