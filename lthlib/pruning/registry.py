"""What a sparsification method is: a score, the moment it is taken, and a rewind point.

Each method is one function in one file of this package, under `@method`. What it may look at is a `Moment`, what it
answers is `Found`, what it does while the network trains is a `Dynamics`.
"""

from __future__ import annotations

import math
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
STARTS = ("init", "rewind", "reinit")
FAMILIES = ("dense", "random", "magnitude", "initialisation", "dynamic", "structured", "control")


@dataclass(frozen=True)
class Moment:
    """All that a method may look at.

    Attributes:
        model: A private copy of the network at the moment the method asked for; the method may change it.
        masks: The masks of the source, all True where it is dense; they name the weights that are pruned.
        n_keep: Prunable weights to keep at this round.
        round: The round on the ladder 1 - 0.8^n.
        seed: Of every draw the method makes.
        batch: ``batch(n)`` returns n training images in a seeded random order, ``batch(per_class=k)`` returns k of each
            class, class by class: float images (N, C, H, W) in [0, 1], and their labels (N,).
        options: Of this method, by name; complete.
        density: The fraction to keep as it was asked for, of which ``n_keep`` is the rounded count; of the round,
            0.8^round, where it is not given.
    """

    model: nn.Module
    masks: Masks
    n_keep: int
    round: int
    seed: int
    batch: Callable[..., tuple[Tensor, Tensor]]
    options: Mapping[str, object] = field(default_factory=dict)
    density: float | None = None

    def __post_init__(self) -> None:
        if self.density is None:
            object.__setattr__(self, "density", (1 - masking.RATE) ** self.round)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights that are pruned, by name."""
        return masking.weights_of(self.model, self.masks)


@dataclass(frozen=True)
class Found:
    """What a method found; nothing for the dense network.

    Attributes:
        scores: One number per prunable weight, by name: the highest ``n_keep`` of those that the source kept are kept.
        counts: How many to keep in each layer, where layers are not ranked together; in total ``n_keep``.
        masks: Instead of scores or beside them: one bool tensor per prunable weight, ``n_keep`` True in total; at least
            as many where the method's `Dynamics` removes the rest during training.
        kept_channels: Structured: sorted indices of the channels kept, by channel group.
        channels: Small dense: the widths of a fresh network, by channel group.
    """

    scores: Mapping[str, Tensor] | None = None
    counts: Mapping[str, int] | None = None
    _: KW_ONLY
    masks: Masks | None = None
    kept_channels: dict[str, Tensor] | None = None
    channels: dict[str, int] | None = None


class Dynamics(Protocol):
    """What a method does while the network trains."""

    def update(self, step: int, model: nn.Module, masks: Masks, optimizer: Optimizer) -> bool:
        """Look at the network after a backward pass, before gradients are masked.

        Pruned weights are exact zeros in the parameters, so ``weight.grad`` is the gradient of all weights, pruned ones
        included, at the sparse network. May change masks (as entries of the dict), weights and momentum. ``step``
        counts the optimizer's steps before this one, from 0.

        Returns:
            Whether the optimizer's step is to be skipped this time.
        """


@dataclass(frozen=True)
class Option:
    """An option of a method: its default, and what else it may be, of the same type.

    A number has a lower bound, ``least`` or ``above``, and perhaps an upper one, ``most``; text has ``choices``; true
    and false need neither.
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
        find: From a `Moment` to `Found`; `run` calls it and checks.
        title: As written in a figure.
        source: The network the method looks at: "init" (untouched initial weights), "dense" (trained), "previous" (the
            method's own ticket one round earlier, trained), or another method, whose ticket of the same round it takes.
        start: Where the ticket's training starts: "init", "rewind" (the shared rewind point of the dense run) or
            "reinit" (initial weights of another seed).
        reference: BibTeX key.
        family: One of `FAMILIES`.
        during: Makes the `Dynamics` from options, number of steps, number of weights to keep at the end, and seed; None
            where masks stand still.
        allowed: Name -> what the option may be.
        source_recipe: Names of options that are settings of the recipe by which the dense source is trained.
        trained_like: Another method, whose ticket of the same round has as many epochs behind it as this one is trained
            for; by default the recipe says how many.
        paper: Whether it is one of the paper's seven.
    """

    name: str
    find: Callable[[Moment], Found]
    _: KW_ONLY
    title: str
    source: str
    start: str
    reference: str
    family: str
    during: Callable[[Mapping[str, object], int, int, int], Dynamics] | None = None
    allowed: Mapping[str, Option] = field(default_factory=dict)
    source_recipe: tuple[str, ...] = ()
    trained_like: str = ""
    paper: bool = False

    def __post_init__(self) -> None:
        choose(self.start, STARTS, "start")
        choose(self.family, FAMILIES, "family")

    @property
    def options(self) -> dict[str, object]:
        """Name -> default."""
        return {name: option.default for name, option in self.allowed.items()}

    def check_options(self, given: Mapping[str, object]) -> None:
        """Raise `UserError` for an option that the method does not have, or a value that it may not have."""
        for name, value in given.items():
            choose(name, self.allowed, f"option of {self.name}")
            option = self.allowed[name]
            if not option.allows(value):
                near = suggest(value, option.choices) if isinstance(value, str) else ""
                raise UserError(f"Option {name} of {self.name} is {shown(value)}; it must be {option}.{near}")

    def run(self, moment: Moment) -> Found:
        """Let the method choose, and check what it found: masks fit and hold exactly ``moment.n_keep`` weights.

        `UserError` for bad options, an empty network, weights or scores that are not finite.
        """
        self.check_options(moment.options)
        if moment.n_keep < 1:
            raise UserError(f"Density {moment.density:.2g} leaves no weight to {self.title}: choose a lower sparsity.")
        for layer, weight in moment.weights.items():
            if not all(map(math.isfinite, torch.aminmax(weight.detach()))):
                raise UserError(
                    f"Weights of layer {layer!r} are not finite, so {self.title} cannot rank them: train the network "
                    "again, at a lower learning rate if its loss diverged."
                )
        found = self.find(moment)
        if found.scores is None and found.masks is None:
            return found
        kept = found.masks
        if kept is None and found.counts is None:
            kept = masking.keep_top(found.scores, moment.n_keep, moment.masks)
        elif kept is None:
            kept = masking.keep_top_per_layer(found.scores, found.counts, moment.masks)
        if {name: mask.shape for name, mask in kept.items()} != {n: mask.shape for n, mask in moment.masks.items()}:
            raise ValueError(f"{self.name} found masks that do not fit its network")
        n_kept = masking.n_kept(kept)
        if n_kept < moment.n_keep or (n_kept > moment.n_keep and self.during is None):
            raise ValueError(f"{self.name} kept {n_kept} weights, not {moment.n_keep}")
        return Found(found.scores, found.counts, masks=kept)


METHODS: Registry[Method] = Registry("method")
"""Every method by its name; full once `lthlib.pruning` is imported."""


def method(name: str, *, options: Mapping[str, Option | bool] | None = None, **fields):
    """Register the function below as the method ``name``; the fields are those of `Method`.

    ``options`` maps names to an `Option`, or to true or false.
    """
    allowed = {n: o if isinstance(o, Option) else Option(o) for n, o in (options or {}).items()}

    def register(find: Callable[[Moment], Found]) -> Callable[[Moment], Found]:
        METHODS[name] = Method(name, find, allowed=allowed, **fields)
        return find

    return register
