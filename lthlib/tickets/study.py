"""A study: the tickets that belong together, and how its description is read and checked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from lthlib.core.errors import UserError, check_plain, choose, shown
from lthlib.pruning import METHODS
from lthlib.pruning.masks import round_of
from lthlib.tickets.ticket import Ticket
from lthlib.training.recipe import Recipe, recipe_from

LAST_ROUND = 100  # leaves one weight of five thousand million


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
        dense = itertools.product(["dense"], [0], self.seeds)
        sparse = itertools.product(self.methods, self.rounds, self.seeds)
        options = {method: tuple(given.items()) for method, given in self.options.items()}
        shared = self.recipe, self.rewind_epoch, self.train_size
        return [
            Ticket(self.data, self.arch, method, round, seed, *shared, options.get(method, ()))
            for method, round, seed in itertools.chain(dense, sparse)
        ]


def study_from(settings: Mapping[str, object]) -> Study:
    """Build a study from plain values, as a notebook's parameters or a grid file give them.

    Accepted keys are the attributes of `Study`, ``method`` for ``methods`` (a name, a list, or "all"), and
    ``sparsities`` for ``rounds`` (fractions, each within half a point of the ladder). An error names the key, the value
    and what is allowed.
    """
    check_plain(settings, "the study")
    given = dict(settings)
    for alias, name in (("method", "methods"), ("sparsities", "rounds")):
        if alias in given and name in given:
            raise UserError(f"Give {alias!r} or {name!r}, not both.")
    for key in given:
        choose(key, [f.name for f in fields(Study)] + ["method", "sparsities"], "key of a study")
    methods = given.pop("method", given.pop("methods", "all"))
    if "sparsities" in given:
        values = given.pop("sparsities")
        given["rounds"] = found = [*map(round_of, values)] if _is_list(values, int, float) else [0]
        if found != sorted(set(found)) or not 1 <= found[0] <= found[-1] <= LAST_ROUND:
            raise UserError(
                f"sparsities is {shown(values)}; it must be a list of fractions from 0.2 on, ascending, none twice, "
                "for instance [0.2, 0.67, 0.89]."
            )
    study = {**given, "methods": _methods(methods), "recipe": recipe_from(given.get("recipe") or {})}
    for key, low, high in (("rounds", 1, LAST_ROUND), ("seeds", 0, 2**31 - 1)):
        if key in study:
            values = study[key]
            rises = _is_list(values, int) and list(values) == sorted(set(values))
            if not rises or not low <= values[0] <= values[-1] <= high:
                raise UserError(
                    f"{key} is {shown(values)}; it must be a list of whole numbers from {low} on, at most {high}, "
                    "ascending, none twice."
                )
            study[key] = tuple(values)
    for key in ("data", "arch"):
        if key in study and not isinstance(study[key], str):
            raise UserError(f"{key} is {shown(study[key])}; it must be a name.")
    size = study.get("train_size")
    if size is not None and (type(size) is not int or size < 1):
        raise UserError(f"train_size is {size!r}; it must be a whole number of images, or null for all.")
    options = study.get("options") or {}
    if not isinstance(options, Mapping) or not all(isinstance(v, Mapping) for v in options.values()):
        raise UserError(f"options is {shown(options)}; it must map methods to mappings of their options.")
    for method in options:
        choose(method, METHODS, "method under options")
        METHODS[method].check_options(options[method])
    made = Study(**{**study, "options": {m: dict(o) for m, o in options.items()}})
    made.tickets()  # each checks the names of its data, network and method
    return made


def _methods(names: object) -> tuple[str, ...]:
    if names == "all":
        return tuple(name for name in METHODS if name != "dense")
    if isinstance(names, str):
        names = [names]
    if not _is_list(names, str):
        raise UserError(f'methods is {shown(names)}; it must be a list of names of methods, or "all".')
    if len(set(names)) < len(names):
        raise UserError(f"methods names one of them twice: {', '.join(names)}.")
    return tuple(name for name in names if name != "dense")


def _is_list(values: object, *kinds: type) -> bool:
    return isinstance(values, list | tuple) and len(values) > 0 and all(type(v) in kinds for v in values)
