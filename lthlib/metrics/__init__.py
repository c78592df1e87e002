"""The registry of metrics: one row says what a number means and which way is better.

A dimension is one file of this package. It holds pure functions, the rows that describe them, and one
`measure` function that turns a ticket into tidy rows (see `lthlib.results.evaluate`).
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from lthlib.core.errors import Registry


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

    @property
    def arrow(self) -> str:
        """↑, ↓ or nothing."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]


METRICS: Registry[Metric] = Registry("metric")


def describe(
    name: str,
    title: str,
    *,
    dimension: str,
    higher_is_better: bool | None,
    unit: str,
    definition: str,
    reference: str,
    in_verdict: bool = False,
    over_classes: bool = False,
) -> None:
    """Add the row of one metric to `METRICS`; the arguments are the attributes of `Metric`."""
    METRICS[name] = Metric(
        name, title, dimension, higher_is_better, unit, definition, reference, in_verdict, over_classes
    )


@dataclass(frozen=True)
class Value:
    """One measured number, on its way into a row.

    Attributes:
        metric: A name in `METRICS`.
        value: In the metric's unit.
        n: Number of images (or other cases) it was measured on.
        shift: What was done to the data: ``"none"``, an out-of-distribution set, a corruption, an attack.
        severity: How much of it; 0 where that means nothing.
    """

    metric: str
    value: float
    n: int
    shift: str = "none"
    severity: float = 0


for _module in pkgutil.walk_packages(__path__, f"{__name__}."):  # each file registers its rows
    importlib.import_module(_module.name)
