"""One row a metric: what its number means and which way is better; and the value that is measured of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lthlib.core.errors import Registry
from lthlib.core.versions import code_version
from lthlib.metrics.arrays import softmax


@dataclass(frozen=True)
class Metric:
    """What one number means.

    Attributes:
        name: The identifier used in rows, for instance ``"ece"``.
        title: What a reader sees, for instance ``"ECE"``.
        dimension: ``"generalization"``, ``"calibration"``, ``"interpretability"`` or ``"flatness"``.
        higher_is_better: The direction: True is drawn ↑, False ↓, None for a number that is no contest.
        unit: ``"fraction"`` (drawn as percent), ``"nats"``, ``"1/pixel²"``, ... ; ``""`` for a pure number.
        definition: One sentence or formula, as LaTeX-flavoured Markdown.
        reference: A BibTeX key of ``book/references.bib``.
        in_verdict: Whether LTH-PASS asks for it (the metrics of the paper do; variants beside them do not).
        over_classes: Whether it is a mean over C classes of which about two take part in an error, so that a
            percentage point of it stands for C/2 points of the same thing without classes (SCE beside ECE).
        function: What computes it, see `metric`; None for what only its dimension's ``measure`` can.
    """

    name: str
    title: str
    dimension: str
    higher_is_better: bool | None
    unit: str
    definition: str
    reference: str
    in_verdict: bool = False
    over_classes: bool = False
    function: Callable | None = field(default=None, repr=False)  # an address would differ in each process

    @property
    def arrow(self) -> str:
        """↑, ↓ or nothing."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]

    @property
    def input(self) -> str:
        """The name of its function's first argument, or nothing."""
        return next(iter(inspect.signature(self.function).parameters)) if self.function else ""


INPUTS = ("logits", "probs", "errors")
METRICS: Registry[Metric] = Registry("metric")
"""Every metric by its name; full once `lthlib.metrics` is imported."""


def metric(name: str, title: str, *, unit: str = "fraction", **fields: object) -> Callable:
    """Register what it is given as a metric: the function below, or a sentence that defines what ``measure`` computes.

    A function takes ``(logits, labels)`` or ``(probs, labels)``, so named, and perhaps ``n_bins``; its docstring starts
    with the definition, and its folder's dimension reports it on the test images without further ado. Corruption errors
    take ``errors`` instead. With a sentence, the ``dimension`` has to be named.
    """

    def register(given: Callable | str) -> Callable | str:
        if isinstance(given, str):
            METRICS[name] = Metric(name, title, unit=unit, definition=given, **fields)
            return given
        first = next(iter(inspect.signature(given).parameters))
        if first not in INPUTS:
            raise ValueError(f"the first argument of the metric {name} is {first}; name it {' or '.join(INPUTS)}")
        definition = " ".join(inspect.getdoc(given).split("\n\n")[0].split())
        dimension = given.__module__.split(".")[2]
        how = {"dimension": dimension, "unit": unit, "definition": definition, "function": given}
        METRICS[name] = Metric(name, title, **how, **fields)
        return given

    return register


def measured_on_test(dimension: str) -> list[str]:
    """Return the metrics of a dimension that are functions of the test images' logits or probabilities."""
    return [m.name for m in METRICS.values() if m.dimension == dimension and m.input in ("logits", "probs")]


def code_of_metrics(dimension: str) -> str:
    """Return the version of the code of `measured_on_test`, which lies in files that no other file need import."""
    return code_version(*(METRICS[name].function for name in measured_on_test(dimension)))


def computed(names: Iterable[str], logits: np.ndarray, labels: np.ndarray, **options: object) -> dict[str, float]:
    """Compute metrics that are functions of logits (N, C) or probabilities, from one softmax in float64.

    Options are passed on to the functions that take them.
    """
    given, found = {"logits": logits, "probs": softmax(logits)}, {}
    for name in names:
        function = METRICS[name].function
        taken = options.keys() & inspect.signature(function).parameters
        found[name] = float(function(given[METRICS[name].input], labels, **{key: options[key] for key in taken}))
    return found


@dataclass(frozen=True)
class Value:
    """One measured number, on its way into a row.

    ``value`` of the metric of that name, in its unit, measured on ``n`` images or other cases. ``shift`` says what was
    done to the data: "none", an out-of-distribution set, a corruption, an attack; ``severity`` how much of it, or 0.
    """

    metric: str
    value: float
    n: int
    shift: str = "none"
    severity: float = 0


Found = tuple[list[Value], dict[str, np.ndarray]]
"""What a dimension's ``measure`` returns: values, and small arrays for figures and the verdict."""


def values(numbers: Mapping[str, float], n: int, shift: str = "none", severity: float = 0) -> list[Value]:
    """Return numbers by metric as values on n images."""
    return [Value(name, float(value), n, shift, severity) for name, value in numbers.items()]
