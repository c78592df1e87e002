"""A ticket: the frozen description of one trained network, whose hash is its folder in the store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace

from lthlib import data, networks
from lthlib.core.errors import UserError, choose
from lthlib.pruning import METHODS, masks
from lthlib.training.loop import Recipe


@dataclass(frozen=True)
class Ticket:
    """The description of one network.

    A field at its default leaves the identity as it was before the field existed, so that a new one does not orphan
    the tickets of old.

    Attributes:
        data: Name of a data set (`lthlib.data.load`).
        arch: Name of an architecture (`lthlib.networks.registry.ARCHITECTURES`).
        method: Name of a sparsification method (`lthlib.pruning.METHODS`).
        round: n on the ladder of sparsities 1 - 0.8^n; 0 is dense.
        seed: Of the initial weights, the order of the images and whatever the method draws.
        recipe: How it is trained.
        rewind_epoch: Epoch of the dense run to whose state a rewinding method returns (k); 0 is initialisation.
        train_size: Number of training images, None for all.
        options: The method's options that differ from its defaults, as (name, value) pairs.
    """

    data: str = "mnist5k"
    arch: str = "resnet8"
    method: str = "dense"
    round: int = 0
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    rewind_epoch: int = 1
    train_size: int | None = None
    options: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        data.check_name(self.data)  # the data may be elsewhere: recorded results need only its name
        choose(self.arch, networks.ARCHITECTURES, "architecture")
        choose(self.method, METHODS, "method")
        for name in ("round", "seed", "rewind_epoch"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise UserError(f"{name} is {value!r}; it must be a whole number from 0 on.")
        if (self.method == "dense") != (self.round == 0):
            raise UserError(
                f"Round {self.round} does not go with the method {self.method!r}: round 0 is the dense network, and "
                "every other method starts at round 1."
            )
        if self.rewind_epoch > self.recipe.epochs:
            raise UserError(f"rewind_epoch is {self.rewind_epoch}; training has {self.recipe.epochs} epochs.")
        object.__setattr__(self, "options", self._checked_options())

    def _checked_options(self) -> tuple[tuple[str, object], ...]:
        """Return the options off their defaults, by name; a whole number where any may stand becomes a float."""
        method, given = METHODS[self.method], dict(self.options)
        method.check_options(given)
        typed = {name: type(method.options[name])(given[name]) for name in sorted(given)}
        return tuple((name, value) for name, value in typed.items() if value != method.options[name])

    @property
    def sparsity(self) -> float:
        """The ladder's sparsity, 1 - 0.8^round; the exact fraction is in the trained ticket."""
        return masks.sparsity_of(self.round)

    @property
    def settings(self) -> dict[str, object]:
        """The method's options by name, complete."""
        return {**METHODS[self.method].options, **dict(self.options)}

    @property
    def dense(self) -> Ticket:
        """The dense parent: same data, network, seed and recipe."""
        return self._relative("dense", 0)

    @property
    def source(self) -> Ticket | None:
        """The finished ticket at whose weights and masks the method looks; None for initial weights."""
        method = METHODS[self.method]
        kind = method.source
        if kind == "init":
            return None
        if kind == "dense" or (kind == "previous" and self.round == 1):
            recipe = {name: self.settings[name] for name in method.source_recipe}
            return replace(self.dense, recipe=replace(self.recipe, **recipe))
        return self._relative(self.method, self.round - 1) if kind == "previous" else self._relative(kind, self.round)

    @property
    def epochs(self) -> int:
        """Epochs at the end of its training, counted from initial weights: its recipe's, or as `trained_like` asks."""
        like = METHODS[self.method].trained_like
        if not like:
            return self.recipe.epochs
        total, ticket = 0, self._relative(like, self.round)
        while ticket is not None:
            total += ticket.epochs - ticket.first_epoch
            ticket = ticket.source
        return total

    @property
    def first_epoch(self) -> int:
        """The epoch at which its own training sets out."""
        return self.rewind_epoch if METHODS[self.method].start == "rewind" else 0

    def _relative(self, method: str, round: int) -> Ticket:
        return replace(self, method=method, round=round, options=self.options if method == self.method else ())

    def describe(self) -> dict[str, object]:
        """Return the fields that make the identity: those off their default and of consequence."""
        standard = asdict(Ticket())
        mine = asdict(self)
        mine["recipe"] = {k: v for k, v in mine["recipe"].items() if v != standard["recipe"][k]}
        if METHODS[self.method].start != "rewind" and not METHODS[self.method].trained_like:
            del mine["rewind_epoch"]
        always = ("data", "arch", "method", "round", "seed")
        return {k: v for k, v in mine.items() if k in always or (v != standard[k] and v not in ({}, ()))}

    @property
    def id(self) -> str:
        """A readable name that ends in the hash of the description; the folder of the ticket in the store."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:12]
        name = self.data.replace("@", "+").lower()
        return f"{name}-{self.arch}-{self.method}-r{self.round:02d}-s{self.seed}-{digest}"
