"""Ticket x dimension -> numbers and a few small arrays, with their provenance, kept in the store."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lthlib.core import machine
from lthlib.core.errors import Registry, UserError, choose, shown
from lthlib.core.store import Store
from lthlib.core.versions import code_version, digest
from lthlib.metrics import METRICS, Value
from lthlib.metrics.resampling import kept_accuracy
from lthlib.tickets.obtain import facts, version_of
from lthlib.tickets.subject import Subject
from lthlib.tickets.ticket import Ticket


@dataclass(frozen=True)
class Dimension:
    """One of the things a sparse network may keep or lose; a module of `lthlib.metrics` with a ``measure`` function.

    ``measure(subject, **parameters)`` returns a list of `Value` and a mapping of small arrays. A function
    ``inputs(subject, **parameters)`` beside it says, as text that changes with it, what a measurement reads beside the
    ticket and its data: versions of foreign and corrupted images, for instance.
    """

    name: str
    title: str
    module: str

    def measure(self):
        """Import the dimension's module and return its ``measure`` function."""
        return importlib.import_module(self.module).measure

    def version(self, subject: Subject, settings: Mapping) -> str:
        """Return a hash of the code and of the foreign images behind the numbers; the ticket's own come on top."""
        inputs = getattr(importlib.import_module(self.module), "inputs", lambda subject, **settings: "")
        return digest([code_version(self.module, __name__), inputs(subject, **settings)])

    def parameters(self, given: Mapping | None = None) -> dict[str, object]:
        """Return the parameters of ``measure``: its defaults, and what is given in their place, of the same types."""
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
"""The four dimensions by name."""
for _name in ("generalization", "calibration", "interpretability", "flatness"):
    DIMENSIONS[_name] = Dimension(_name, _name.capitalize(), f"lthlib.metrics.{_name}.measure")


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
        made = {**machine.provenance(precision), "parameters": settings, "n_classes": len(subject.data.classes)}
        content = {"values": [asdict(value) for value in values], "provenance": made}
        (folder / "values.json").write_text(json.dumps(content))
        np.savez_compressed(folder / "arrays.npz", **arrays)

    known_by = f"{version_of(ticket, subject.data)}-{DIMENSIONS[dimension].version(subject, settings)}"
    folder = store.get(evaluation_key(ticket, dimension, settings, precision), known_by, make)
    content = json.loads((folder / "values.json").read_text())
    with np.load(folder / "arrays.npz") as file:
        arrays = dict(file)
    values = [Value(**value) for value in content["values"]]
    return Evaluation(ticket, facts(ticket, store), values, arrays, content["provenance"])


def evaluation_key(ticket: Ticket, dimension: str, settings: Mapping, precision: str) -> str:
    """Return where the store keeps an evaluation, all parameters given."""
    return f"evaluations/{ticket.id}/{question(dimension, settings, precision)}"


def question(dimension: str, settings: Mapping, precision: str) -> str:
    """Return a name for a dimension with all its parameters: what two evaluations must share to be the same."""
    text = json.dumps([settings, precision], sort_keys=True, default=list)
    return f"{dimension}-{digest([text])[:10]}"


def measured(subject: Subject, dimension: str, settings: Mapping) -> tuple[list[Value], Mapping[str, np.ndarray]]:
    """Measure a subject in one dimension, with all parameters given; no number means much without test accuracy."""
    values, arrays = DIMENSIONS[dimension].measure()(subject, **settings)
    if all(value.metric != "test_accuracy" for value in values):
        labels = subject.data.test.labels.numpy()
        logits = subject.logits("test", len(labels))
        values = [Value("test_accuracy", float((logits.argmax(1) == labels).mean()), len(labels)), *values]
        arrays = {**arrays, **kept_accuracy(logits, labels)}
    for value in values:
        METRICS[value.metric]  # an unknown name raises
        if not np.isfinite(value.value):
            raise UserError(f"{value.metric} of {subject.ticket.id} is {value.value} (shift {value.shift}).")
    return values, arrays
