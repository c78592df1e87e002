"""Ticket x dimension -> tidy rows and a few small arrays, recorded with provenance.

A `Study` names the tickets that belong together; `collect` brings in the evaluations of one dimension for all of
them: from recorded results where these answer the question, else from the store, else by computing what is missing.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from lthlib import compute
from lthlib.code_version import code_version
from lthlib.errors import Registry, UserError, choose
from lthlib.masks import rounds_of
from lthlib.metrics import METRICS, Value
from lthlib.models import ARCHITECTURES
from lthlib.predictions import Subject
from lthlib.pruners import METHODS
from lthlib.store import MANIFEST, Store, sha256, write_atomically
from lthlib.tickets import Ticket, version_of
from lthlib.train import Recipe, recipe_from

COLUMNS = (
    "dataset", "arch", "method", "sparsity", "seed", "dimension", "metric", "shift", "severity", "n", "value", "ticket",
)  # fmt: skip


@dataclass(frozen=True)
class Dimension:
    """One of the things a sparse network may keep or lose; a file of `lthlib.metrics` with a ``measure`` function.

    ``measure(subject, **parameters)`` returns a list of `Value` and a mapping of small arrays.
    """

    name: str
    title: str
    module: str

    def measure(self):
        """Import the dimension's file and return its ``measure`` function."""
        return importlib.import_module(self.module).measure

    def inputs(self, subject: Subject, settings: Mapping) -> str:
        """Return what a measurement reads beside the ticket and its data, as text that changes with it.

        That is what the file's function ``inputs(subject, **parameters)`` says: versions of foreign and corrupted
        images, for instance. Empty where the file has none.
        """
        found = getattr(importlib.import_module(self.module), "inputs", None)
        if found is None:
            return ""
        return "-" + hashlib.sha256(found(subject, **settings).encode()).hexdigest()[:12]

    def parameters(self, given: Mapping | None = None) -> dict[str, object]:
        """Return the parameters of ``measure``: its defaults, and what is given in their place.

        Raises:
            UserError: For an unknown parameter or one of another type than its default.
        """
        signature = inspect.signature(self.measure()).parameters
        defaults = {name: p.default for name, p in signature.items() if p.kind is p.KEYWORD_ONLY}
        for name, value in (given or {}).items():
            choose(name, defaults, f"parameter of {self.name}")
            kinds = {tuple: (tuple, list), float: (float, int)}.get(
                type(defaults[name]), type(defaults[name])
            )
            if defaults[name] is not None and not isinstance(value, kinds):
                raise UserError(
                    f"Parameter {name} of {self.name} is {value!r}; it must be like its default {defaults[name]!r}."
                )
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in (given or {}).items()}
        return {**defaults, **given}


DIMENSIONS: Registry[Dimension] = Registry("dimension")
for _name, _title in (
    ("generalization", "Generalization"),
    ("calibration", "Calibration"),
    ("interpretability", "Interpretability"),
    ("flatness", "Flatness"),
):
    DIMENSIONS[_name] = Dimension(_name, _title, f"lthlib.metrics.{_name}")


@dataclass(frozen=True)
class Study:
    """Tickets that belong together: one data set, one architecture, one recipe; methods x rounds x seeds.

    Attributes:
        data: Name of a data set.
        arch: Name of an architecture.
        methods: Names of methods, without "dense" (which is always there); ``"all"`` is every registered one.
        rounds: Rounds on the ladder 1 - 0.8^n, ascending.
        seeds: Seeds; each has its own dense parent.
        recipe: How everything is trained.
        rewind_epoch: Rewind point of the methods that rewind.
        train_size: Number of training images, None for all.
        options: Options by method, where they differ from the method's defaults.
    """

    data: str = "mnist5k"
    arch: str = "resnet8"
    methods: tuple[str, ...] = ("lth",)
    rounds: tuple[int, ...] = (1, 4, 8)
    seeds: tuple[int, ...] = (0,)
    recipe: Recipe = field(default_factory=Recipe)
    rewind_epoch: int = 1
    train_size: int | None = None
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def tickets(self) -> list[Ticket]:
        """Return the dense tickets, then those of each method by seed and round."""
        dense = [self._ticket("dense", 0, seed) for seed in self.seeds]
        return dense + [
            self._ticket(*which) for which in itertools.product(self.methods, self.rounds, self.seeds)
        ]

    def _ticket(self, method: str, round: int, seed: int) -> Ticket:
        return Ticket(
            self.data, self.arch, method, round, seed, self.recipe, self.rewind_epoch, self.train_size,
            tuple(self.options.get(method, {}).items()),
        )  # fmt: skip


def study_from(settings: Mapping[str, object]) -> Study:
    """Build a study from plain values, as a notebook's parameters or a grid file give them.

    Accepted keys are the attributes of `Study`, ``method`` for ``methods`` (a name, a list, or "all"), and
    ``sparsities`` for ``rounds`` (fractions, each within half a point of the ladder).

    Raises:
        UserError: Naming the key, the value and what is allowed.
    """
    given = dict(settings)
    for alias, name in (("method", "methods"), ("sparsities", "rounds")):
        if alias in given and name in given:
            raise UserError(f"Give {alias!r} or {name!r}, not both.")
    for key in given:
        choose(key, [f.name for f in fields(Study)] + ["method", "sparsities"], "key of a study")
    methods = given.pop("method", given.pop("methods", "all"))
    if "sparsities" in given:
        values = given.pop("sparsities")
        _check_list(values, (int, float), "sparsities", "fractions in [0, 1), for instance [0.2, 0.67, 0.89]")
        given["rounds"] = rounds_of(values)
    study = {
        **given,
        "methods": _methods(methods),
        "recipe": recipe_from(given.get("recipe") or {}),
    }
    for key, low in (("rounds", 1), ("seeds", 0)):
        if key in study:
            what = f"whole numbers from {low} on, ascending, none twice"
            _check_list(study[key], int, key, what)
            if list(study[key]) != sorted(set(study[key])) or study[key][0] < low:
                raise UserError(f"{key} is {list(study[key])}; it must be a list of {what}.")
            study[key] = tuple(study[key])
    for key in ("data", "arch"):
        if key in study and not isinstance(study[key], str):
            raise UserError(f"{key} is {study[key]!r}; it must be a name.")
    size = study.get("train_size")
    if size is not None and (type(size) is not int or size < 1):
        raise UserError(f"train_size is {size!r}; it must be a whole number of images, or null for all.")
    options = study.get("options") or {}
    if not isinstance(options, Mapping) or not all(isinstance(v, Mapping) for v in options.values()):
        raise UserError(f"options is {options!r}; it must map methods to mappings of their options.")
    for method in options:
        choose(method, METHODS, "method under options")
    made = Study(**{**study, "options": {m: dict(o) for m, o in options.items()}})
    choose(made.arch, ARCHITECTURES, "architecture")
    made.tickets()  # each checks itself
    return made


def _methods(names: object) -> tuple[str, ...]:
    if names == "all":
        return tuple(name for name in METHODS if name != "dense")
    if isinstance(names, str):
        names = [names]
    _check_list(names, str, "methods", 'names of methods, or "all"')
    for name in names:
        choose(name, METHODS, "method")
    if len(set(names)) < len(names):
        raise UserError(f"methods names one of them twice: {', '.join(names)}.")
    return tuple(name for name in names if name != "dense")


def _check_list(values: object, kinds: type | tuple[type, ...], key: str, what: str) -> None:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    good = isinstance(values, list | tuple) and len(values) > 0 and all(type(v) in kinds for v in values)
    if not good:
        raise UserError(f"{key} is {values!r}; it must be a list of {what}.")


@dataclass(frozen=True)
class Evaluation:
    """What one dimension found about one ticket.

    Attributes:
        ticket: The description.
        info: The ticket's own facts (``ticket.json``).
        values: The measured numbers, test accuracy among them whatever the dimension.
        arrays: Small arrays for figures.
        provenance: Commit, versions, machine, seconds.
    """

    ticket: Ticket
    info: Mapping
    values: list[Value]
    arrays: Mapping[str, np.ndarray]
    provenance: Mapping


def evaluate(
    ticket: Ticket, dimension: str, store: Store, parameters: Mapping | None = None, precision: str = "auto"
) -> Evaluation:
    """Measure a ticket in one dimension, or read what was measured before with the same code and parameters.

    Args:
        ticket: Which; trained first where it has to be.
        dimension: A name in `DIMENSIONS`.
        store: Where tickets, logits and evaluations are kept.
        parameters: Of the dimension, where they differ from its defaults.
        precision: Of the forward passes for logits.
    """
    subject = Subject(ticket, store, precision)
    settings = DIMENSIONS[dimension].parameters(parameters)
    measure = DIMENSIONS[dimension].measure()

    def make(folder: Path) -> None:
        values, arrays = measure(subject, **settings)
        values = _with_accuracy(values, subject)
        _check_values(values, ticket)
        content = {
            "values": [asdict(value) for value in values],
            "provenance": {
                **compute.provenance(precision),
                "parameters": settings,
                "n_classes": len(subject.data.classes),
            },
        }
        (folder / "values.json").write_text(json.dumps(content))
        np.savez_compressed(folder / "arrays.npz", **arrays)

    version = f"{version_of(ticket, subject.data)}-{code_version(measure, _with_accuracy)}"
    version += DIMENSIONS[dimension].inputs(subject, settings)
    folder = store.get(f"evaluations/{ticket.id}/{question(dimension, settings, precision)}", version, make)
    content = json.loads((folder / "values.json").read_text())
    with np.load(folder / "arrays.npz") as arrays:
        found = dict(arrays)
    info = json.loads((store.path(f"tickets/{ticket.id}") / "ticket.json").read_text())
    return Evaluation(ticket, info, [Value(**v) for v in content["values"]], found, content["provenance"])


def question(dimension: str, parameters: Mapping, precision: str) -> str:
    """Return a name for a dimension with all its parameters: what two evaluations must share to be the same."""
    text = json.dumps([parameters, precision], sort_keys=True, default=list)
    return f"{dimension}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _with_accuracy(values: list[Value], subject: Subject) -> list[Value]:
    """Add the test accuracy where the dimension did not: no number means much without it."""
    if any(value.metric == "test_accuracy" for value in values):
        return values
    labels = subject.data.test.labels.numpy()
    right = subject.logits("test", len(labels)).argmax(1) == labels
    return [Value("test_accuracy", float(right.mean()), len(labels)), *values]


def _check_values(values: Iterable[Value], ticket: Ticket) -> None:
    for value in values:
        METRICS[value.metric]  # an unknown name raises
        if not np.isfinite(value.value):
            raise UserError(f"{value.metric} of {ticket.id} is {value.value} (shift {value.shift}).")


@dataclass(frozen=True)
class Results:
    """The evaluations of a study, as tables.

    Attributes:
        study: What was asked.
        dimension: In which dimension.
        rows: Tidy table with the columns `COLUMNS` and ``round``.
        tickets: One line a ticket: method, round, seed, counts, cost.
        arrays: Small arrays by ticket id.
        provenance: One mapping a ticket.
        recorded: Ids of the tickets that were read from recorded results.
    """

    study: Study
    dimension: str
    rows: pd.DataFrame
    tickets: pd.DataFrame
    arrays: Mapping[str, Mapping[str, np.ndarray]]
    provenance: Sequence[Mapping]
    recorded: frozenset[str]


def collect(
    study: Study,
    dimension: str,
    store: Store,
    *,
    parameters: Mapping | None = None,
    recorded: Path | str | None = None,
    compute_missing: bool = True,
    precision: str = "auto",
) -> Results:
    """Gather the evaluations of every ticket of a study, computing (with a progress bar) what is missing.

    Args:
        study: Which tickets.
        dimension: A name in `DIMENSIONS`.
        store: Where tickets and evaluations are kept.
        parameters: Of the dimension.
        recorded: Folder of recorded results (``book/results``), read before anything is computed; None to ignore.
        compute_missing: Whether to compute what is not recorded; else that is an error.
        precision: Of the forward passes for logits.

    Raises:
        UserError: Where results are missing and may not be computed.
    """
    settings = DIMENSIONS[dimension].parameters(parameters)
    name = question(dimension, settings, precision)
    archive = Archive.read(recorded) if recorded else {}
    tickets = study.tickets()
    found, from_record = [], set()
    missing = [ticket.id for ticket in tickets if (ticket.id, name) not in archive]
    if missing and not compute_missing:
        raise UserError(
            f"{len(missing)} of {len(tickets)} evaluations are not among the recorded results in {recorded}, the first "
            f"is {missing[0]}: record the grid again, or allow computing."
        )
    for ticket in tqdm(tickets, desc=dimension, unit="ticket", delay=2, leave=False):
        if (ticket.id, name) in archive:
            from_record.add(ticket.id)
            found.append(archive[ticket.id, name].evaluation(ticket))
        else:
            found.append(evaluate(ticket, dimension, store, settings, precision))
    return Results(
        study, dimension, rows_of(found, dimension), _ticket_table(found),
        {e.ticket.id: e.arrays for e in found}, [e.provenance for e in found], frozenset(from_record),
    )  # fmt: skip


def rows_of(evaluations: Iterable[Evaluation], dimension: str) -> pd.DataFrame:
    """Return the tidy table of some evaluations: one line a number."""
    lines = []
    for e in evaluations:
        ticket, name = e.ticket, e.ticket.id
        which = ticket.data, ticket.arch, ticket.method, e.info["sparsity"], ticket.seed, dimension
        lines += [(*which, v.metric, v.shift, v.severity, v.n, v.value, name, ticket.round) for v in e.values]
    return pd.DataFrame(lines, columns=[*COLUMNS, "round"])


def _ticket_table(evaluations: Iterable[Evaluation]) -> pd.DataFrame:
    counts = ("sparsity", "n_kept", "n_prunable", "n_parameters", "macs", "macs_dense_kernel", "macs_parent")
    return pd.DataFrame([
        {"ticket": e.ticket.id, "method": e.ticket.method, "round": e.ticket.round, "seed": e.ticket.seed,
         **{name: e.info[name] for name in counts}, **e.info["cost"], "density_by_layer": e.info["density_by_layer"]}
        for e in evaluations
    ])  # fmt: skip


# --- recorded results --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One evaluation among recorded results: where its numbers lie, read when asked for."""

    folder: Path
    entry: Mapping
    arrays_file: str

    def evaluation(self, ticket: Ticket) -> Evaluation:
        """Read the evaluation."""
        arrays = {}
        with np.load(self.folder / self.arrays_file) as file:
            for key in self.entry["arrays"]:
                arrays[key] = file[f"{ticket.id}/{key}"]
        values = [Value(**value) for value in self.entry["values"]]
        return Evaluation(ticket, self.entry["info"], values, arrays, self.entry["provenance"])


class Archive:
    """Recorded results: ``<root>/<grid>/{dimension}.json``, ``{dimension}.npz`` and a manifest, small and committed."""

    @staticmethod
    def read(root: Path | str) -> dict[tuple[str, str], Record]:
        """Index all recorded evaluations by (ticket id, question).

        Raises:
            UserError: Where a recorded file is damaged.
        """
        found = {}
        for manifest in sorted(Path(root).glob(f"*/{MANIFEST}")):
            folder = manifest.parent
            try:
                files = json.loads(manifest.read_text())["files"]
                for name, (size, digest) in files.items():
                    if (folder / name).stat().st_size != size or sha256(folder / name) != digest:
                        raise ValueError(f"{name} is not what was recorded")
                for path in (folder / name for name in files if name.endswith(".json")):
                    for entry in json.loads(path.read_text()):
                        found[entry["ticket"], entry["question"]] = Record(folder, entry, f"{path.stem}.npz")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"The recorded results in {folder} are damaged ({error}): restore them with "
                    f"`git checkout -- {folder}` or record them again."
                ) from error
        return found

    @staticmethod
    def write(
        folder: Path,
        evaluations: Mapping[str, Sequence[tuple[str, Evaluation]]],
        tables: Mapping[str, pd.DataFrame] | None = None,
    ) -> None:
        """Record evaluations.

        Args:
            folder: ``book/results/<grid>``.
            evaluations: By dimension, pairs of a question's name and its evaluation.
            tables: What else there is to record, by file name (``*.csv``).
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for dimension, pairs in evaluations.items():
            entries = [
                {"ticket": e.ticket.id, "question": name, "info": {k: v for k, v in e.info.items() if k != "history"},
                 "values": [asdict(v) for v in e.values], "arrays": sorted(e.arrays), "provenance": e.provenance}
                for name, e in pairs
            ]  # fmt: skip
            text = "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n"
            write_atomically(folder / f"{dimension}.json", text)
            with (folder / f"{dimension}.npz").open("wb") as file:
                np.savez_compressed(
                    file, **{f"{e.ticket.id}/{key}": a for _, e in pairs for key, a in e.arrays.items()}
                )
            files += [f"{dimension}.json", f"{dimension}.npz"]
        for name, table in (tables or {}).items():
            write_atomically(folder / name, table.to_csv(index=False))
            files.append(name)
        sizes = {name: [(folder / name).stat().st_size, sha256(folder / name)] for name in files}
        write_atomically(folder / MANIFEST, json.dumps({"files": sizes}, indent=1) + "\n")
