"""Ticket x dimension -> tidy rows and a few small arrays, recorded with provenance.

`collect` brings in the evaluations of one dimension for all tickets of a study: from recorded results where these
answer the question, else from the store, else by computing what is missing.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from lthlib.core import machine as compute
from lthlib.core.errors import Registry, UserError, choose, shown
from lthlib.core.store import MANIFEST, ROOT, Store, check_files, sha256, unseal, write_atomically
from lthlib.core.versions import code_version
from lthlib.metrics import METRICS, Value
from lthlib.tickets.study import Study
from lthlib.tickets.subject import Subject
from lthlib.tickets.ticket import Ticket, facts, version_of

LATENCY = ROOT / "book" / "results" / "latency.json"  # of a machine, not of a grid

COLUMNS = (
    "dataset",
    "arch",
    "method",
    "sparsity",
    "seed",
    "dimension",
    "metric",
    "shift",
    "severity",
    "n",
    "value",
    "ticket",
)


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
            if not _is_like(value, defaults[name]):
                raise UserError(
                    f"Parameter {name} of {self.name} is {shown(value)}; it must be like its default "
                    f"{defaults[name]!r}, and no number below 0."
                )
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in (given or {}).items()}
        return {**defaults, **given}


def _is_like(value: object, default: object) -> bool:
    """Say whether a value can stand in a default's place; none is below 0."""
    if default is None:
        return True
    if isinstance(default, tuple):
        kind = default[0] if default else None
        return isinstance(value, tuple | list) and all(_is_like(entry, kind) for entry in value)
    if type(value) not in ((float, int) if type(default) is float else (type(default),)):
        return False
    return isinstance(value, str) or value >= 0


DIMENSIONS: Registry[Dimension] = Registry("dimension")
for _name, _title in (
    ("generalization", "Generalization"),
    ("calibration", "Calibration"),
    ("interpretability", "Interpretability"),
    ("flatness", "Flatness"),
):
    DIMENSIONS[_name] = Dimension(_name, _title, f"lthlib.metrics.{_name}.measure")


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

    def make(folder: Path) -> None:
        values, arrays = measured(subject, dimension, settings)
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

    version = f"{version_of(ticket, subject.data)}-{measuring(subject, dimension, settings)}"
    folder = store.get(f"evaluations/{ticket.id}/{question(dimension, settings, precision)}", version, make)
    content = json.loads((folder / "values.json").read_text())
    with np.load(folder / "arrays.npz") as arrays:
        found = dict(arrays)
    return Evaluation(
        ticket, facts(ticket, store), [Value(**v) for v in content["values"]], found, content["provenance"]
    )


def measuring(subject: Subject, dimension: str, settings: Mapping) -> str:
    """Return a hash of the code and the foreign images behind a dimension's numbers; the ticket's own come on top."""
    code = code_version(DIMENSIONS[dimension].measure(), _with_accuracy)
    return code + DIMENSIONS[dimension].inputs(subject, settings)


def measured(subject: Subject, dimension: str, settings: Mapping) -> tuple[list[Value], Mapping[str, np.ndarray]]:
    """Measure a subject in one dimension, with all parameters given; the values hold its test accuracy, too."""
    values, arrays = DIMENSIONS[dimension].measure()(subject, **settings)
    values = _with_accuracy(values, subject)
    _check_values(values, subject.ticket)
    return values, arrays


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
        study,
        dimension,
        rows_of(found, dimension),
        _ticket_table(found),
        {e.ticket.id: e.arrays for e in found},
        [e.provenance for e in found],
        frozenset(from_record),
    )


def rows_of(evaluations: Iterable[Evaluation], dimension: str) -> pd.DataFrame:
    """Return the tidy table of some evaluations: one line a number."""
    return table_of([(e.ticket, e.info["sparsity"], e.values) for e in evaluations], dimension)


def table_of(found: Iterable[tuple[Ticket, float, Sequence[Value]]], dimension: str) -> pd.DataFrame:
    """Return the tidy table of what one dimension found: tickets with their sparsity and values."""
    lines = []
    for ticket, sparsity, values in found:
        which = ticket.data, ticket.arch, ticket.method, sparsity, ticket.seed, dimension
        lines += [(*which, v.metric, v.shift, v.severity, v.n, v.value, ticket.id, ticket.round) for v in values]
    return pd.DataFrame(lines, columns=[*COLUMNS, "round"])


def _ticket_table(evaluations: Iterable[Evaluation]) -> pd.DataFrame:
    counts = ("sparsity", "n_kept", "n_prunable", "n_parameters", "macs", "macs_dense_kernel", "macs_parent")
    return pd.DataFrame(
        [
            {
                "ticket": e.ticket.id,
                "method": e.ticket.method,
                "round": e.ticket.round,
                "seed": e.ticket.seed,
                **{name: e.info[name] for name in counts},
                **e.info["cost"],
                "density_by_layer": e.info["density_by_layer"],
            }
            for e in evaluations
        ]
    )


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


def damaged(path: Path, what: object) -> UserError:
    """Return the error for damage to something recorded, which cannot be made again but lies in git."""
    name = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
    return UserError(
        f"The recorded results in {name} are damaged ({what}): restore them with `git checkout -- {name}`, or record "
        "them again."
    )


def recorded_json(path: Path) -> Mapping:
    """Read a recorded file that `lthlib.core.store.seal` wrote; UserError where it is damaged."""
    try:
        return unseal(path)
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


class Archive:
    """Recorded results: ``<root>/<grid>/{dimension}.json.gz``, ``{dimension}.npz`` and a manifest, small, committed."""

    @staticmethod
    def read(root: Path | str) -> dict[tuple[str, str], Record]:
        """Index all recorded evaluations by (ticket id, question).

        Raises:
            UserError: Where a recorded file is damaged.
        """
        found = {}
        for folder in sorted(Path(root).glob("[!.]*/")):
            for name in (name for name in Archive.check(folder) if name.endswith(".json.gz")):
                for entry in json.loads(gzip.decompress((folder / name).read_bytes())):
                    arrays = name.replace(".json.gz", ".npz")
                    found[entry["ticket"], entry["question"]] = Record(folder, entry, arrays)
        return found

    @staticmethod
    def check(folder: Path) -> list[str]:
        """Verify the recorded results of one grid, and return the names of their files.

        Raises:
            UserError: Where one is damaged or missing; says which, and how to get it back.
        """
        try:
            try:
                files = json.loads((folder / MANIFEST).read_bytes())["files"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{MANIFEST} cannot be read") from None
            check_files(folder, files)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            damage = f"{Path(error.filename).name}: {error.strerror}" if isinstance(error, OSError) else error
            raise damaged(folder, damage) from error
        return list(files)

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
                {
                    "ticket": e.ticket.id,
                    "question": name,
                    "info": {k: v for k, v in e.info.items() if k != "history"},
                    "values": [asdict(v) for v in e.values],
                    "arrays": sorted(e.arrays),
                    "provenance": e.provenance,
                }
                for name, e in pairs
            ]
            packed = gzip.compress(json.dumps(entries).encode(), mtime=0)  # the same bytes for the same results
            write_atomically(folder / f"{dimension}.json.gz", packed)
            with (folder / f"{dimension}.npz").open("wb") as file:
                np.savez_compressed(
                    file, **{f"{e.ticket.id}/{key}": a for _, e in pairs for key, a in e.arrays.items()}
                )
            files += [f"{dimension}.json.gz", f"{dimension}.npz"]
        for name, table in (tables or {}).items():
            write_atomically(folder / name, table.to_csv(index=False))
            files.append(name)
        sizes = {name: [(folder / name).stat().st_size, sha256(folder / name)] for name in files}
        write_atomically(folder / MANIFEST, json.dumps({"files": sizes}, indent=1) + "\n")
