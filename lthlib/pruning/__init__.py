"""Sparsification methods: a method is a score, the moment it is taken, and a rewind point.

Each method is one function in one file of this package, under `@method`; a new file registers itself. What a
method may look at is a `Moment`, what it answers is `Found`, what it does while the network trains is a
`Dynamics`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lthlib.core.errors import Registry, UserError, choose, shown, suggest
from lthlib.pruning import masks as masking
from lthlib.pruning.masks import Masks

LARGEST = 2**63  # of any number that a grid may hold (`errors.check_plain`)
SOURCES = ("init", "dense", "previous")  # or another method
FAMILIES = ("dense", "random", "magnitude", "initialisation", "dynamic", "structured", "control")


@dataclass(frozen=True)
class Moment:
    """All that a method may look at.

    Attributes:
        model: A private copy of the network at the moment the method asked for; the method may change it.
        masks: The masks of the source, all True where it is dense.
        n_keep: Prunable weights to keep at this round.
        round: The round on the ladder 1 - 0.8^n.
        seed: Of every draw the method makes.
        batch: ``batch(n)`` returns n training images in a seeded random order, ``batch(per_class=k)`` returns
            k of each class, class by class: float images (N, C, H, W) in [0, 1], and their labels (N,).
        options: Of this method, by name; complete.
    """

    model: nn.Module
    masks: Masks
    n_keep: int
    round: int
    seed: int
    batch: Callable[..., tuple[Tensor, Tensor]]
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a method found: at most one of the three, none of them for the dense network.

    Attributes:
        masks: Unstructured: one bool tensor per prunable weight, ``n_keep`` True in total; at least as many where
            the method's `Dynamics` removes the rest during training.
        kept_channels: Structured: sorted indices of the channels kept, by channel group.
        channels: Small dense: the widths of a fresh network, by channel group.
    """

    masks: Masks | None = None
    kept_channels: dict[str, Tensor] | None = None
    channels: dict[str, int] | None = None


class Dynamics(Protocol):
    """What a method does while the network trains."""

    def update(self, step: int, model: nn.Module, masks: Masks, optimizer: Optimizer) -> bool:
        """Look at the network after a backward pass, before gradients are masked.

        Pruned weights are exact zeros in the parameters, so ``weight.grad`` is the gradient of all weights,
        pruned ones included, at the sparse network. May change masks (as entries of the dict), weights and
        momentum.

        Args:
            step: Optimizer steps before this one, from 0.
            model: The network in training.
            masks: Its masks, changed in place.
            optimizer: Its optimizer.

        Returns:
            Whether the optimizer's step is to be skipped this time.
        """


@dataclass(frozen=True)
class Option:
    """An option of a method: its default, and what else it may be, of the same type.

    A number has a lower bound, ``least`` or ``above``; text has ``choices``; true and false need neither.

    Attributes:
        default: What it is where nobody sets it.
        least: The smallest number allowed.
        above: A number that has to be exceeded.
        most: The largest number allowed; None where there is none.
        choices: The texts allowed.
    """

    default: bool | int | float | str
    _: KW_ONLY
    least: float | None = None
    above: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        is_number = type(self.default) in (int, float)
        if is_number and (self.least is None) == (self.above is None):
            raise ValueError(f"an option that is a number has to have least or above: {self!r}")
        if not is_number and not self.allows(self.default):
            raise ValueError(f"an option that is text has to have choices, its default among them: {self!r}")

    def allows(self, value: object) -> bool:
        """Say whether the option may have a value; a whole number may stand for any."""
        kind = type(self.default)
        if type(value) is not kind and (kind, type(value)) != (float, int):
            return False
        if kind is bool or kind is str:
            return kind is bool or value in self.choices
        is_high = value > self.above if self.least is None else value >= self.least
        return is_high and value < LARGEST and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        """Say what is allowed."""
        if isinstance(self.default, bool):
            return "true or false"
        if self.choices:
            return " or ".join(map(repr, self.choices))
        low = f"above {self.above:g}" if self.least is None else f"from {self.least:g} on"
        high = "" if self.most is None else f", at most {self.most:g}"
        return f"a {'whole ' if isinstance(self.default, int) else ''}number {low}{high}"


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`.

    Attributes:
        name: As written in a grid.
        title: As written in a figure.
        find: From a `Moment` to `Found`.
        source: The network the method looks at: "init" (untouched initial weights), "dense" (trained),
            "previous" (the method's own ticket one round earlier, trained), or another method, whose
            ticket of the same round it takes.
        start: Where the ticket's training starts: "init", "rewind" (the shared rewind point of the dense run)
            or "reinit" (initial weights of another seed).
        during: Makes the `Dynamics` from options, number of steps, number of weights to keep at the end, and seed;
            None where masks stand still.
        options: Name -> default.
        allowed: Name -> what the option may be.
        source_recipe: Names of options that are settings of the recipe by which the dense source is trained.
        reference: BibTeX key.
        family: One of `FAMILIES`.
        paper: Whether it is one of the paper's seven.
    """

    name: str
    title: str
    find: Callable[[Moment], Found]
    source: str
    start: str
    during: Callable[[Mapping[str, object], int, int, int], Dynamics] | None
    options: Mapping[str, object]
    allowed: Mapping[str, Option]
    source_recipe: tuple[str, ...]
    reference: str
    family: str
    paper: bool

    def check_options(self, given: Mapping[str, object]) -> None:
        """Raise `UserError` for an option that the method does not have, or a value that it may not have."""
        for name, value in given.items():
            choose(name, self.allowed, f"option of {self.name}")
            option = self.allowed[name]
            if not option.allows(value):
                near = suggest(value, option.choices) if isinstance(value, str) else ""
                raise UserError(f"Option {name} of {self.name} is {shown(value)}; it must be {option}.{near}")


METHODS: Registry[Method] = Registry("method")


def method(
    name: str,
    *,
    title: str,
    source: str,
    start: str,
    reference: str,
    family: str,
    during: Callable[[Mapping[str, object], int, int, int], Dynamics] | None = None,
    options: Mapping[str, Option | bool] | None = None,
    source_recipe: tuple[str, ...] = (),
    paper: bool = False,
):
    """Register the function below as the method ``name``; the fields are those of `Method`.

    ``options`` maps names to an `Option`, or to true or false.
    """
    choose(start, ("init", "rewind", "reinit"), "start")
    choose(family, FAMILIES, "family")
    allowed = {n: o if isinstance(o, Option) else Option(o) for n, o in (options or {}).items()}

    def register(find: Callable[[Moment], Found]) -> Callable[[Moment], Found]:
        METHODS[name] = Method(
            name,
            title,
            find,
            source,
            start,
            during,
            {option: allowed[option].default for option in allowed},
            allowed,
            source_recipe,
            reference,
            family,
            paper,
        )
        return find

    return register


def find(name: str, moment: Moment) -> Found:
    """Run a method and check what it found: the masks fit and hold exactly ``moment.n_keep`` weights.

    Raises:
        UserError: For an unknown method or option, a value that an option may not have, an empty network, scores that
            are not finite, masks that do not fit.
    """
    entry = METHODS[name]
    entry.check_options(moment.options)
    masking.prunable(moment.model)
    masking.check_fits(moment.model, moment.masks)
    if moment.n_keep < 1:
        raise UserError(f"Round {moment.round} leaves no weight to {entry.title}: choose a lower sparsity.")
    weights = masking.prunable(moment.model)
    for layer, weight in weights.items():
        if not all(map(math.isfinite, torch.aminmax(weight.detach()))):
            raise UserError(
                f"Weights of layer {layer!r} are not finite, so {entry.title} cannot rank them: train the network "
                "again, at a lower learning rate if its loss diverged."
            )
    shapes = {layer: weight.shape for layer, weight in weights.items()}
    found = entry.find(moment)
    if found.masks is not None:
        if {layer: mask.shape for layer, mask in found.masks.items()} != shapes:
            raise ValueError(f"{name} found masks that do not fit its network")
        missing = moment.n_keep - masking.n_kept(found.masks)
        if missing > 0 or (missing and entry.during is None):
            raise ValueError(f"{name} kept {masking.n_kept(found.masks)} weights, not {moment.n_keep}")
    return found


def _check_sources() -> None:
    """Raise `UserError` where a method's source is neither a network that there is nor another method."""
    for entry in METHODS.values():
        choose(entry.source, (*SOURCES, *(name for name in METHODS if name != entry.name)), f"source of {entry.name}")


def _sort() -> None:
    """Order the registry by family, the paper's methods first, whatever the files are called."""
    entries = sorted(METHODS.values(), key=lambda m: (FAMILIES.index(m.family), not m.paper))
    METHODS.clear()
    METHODS.update((entry.name, entry) for entry in entries)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
_check_sources()
_sort()
