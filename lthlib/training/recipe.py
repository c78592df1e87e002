"""How a network is trained: the recipe that every sparse network of a study shares with its dense parent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from lthlib.core.errors import UserError, choose
from lthlib.core.machine import PRECISIONS

AUGMENTATIONS = ("none", "crop", "crop-flip")
SCHEDULES = ("cosine", "steps", "constant")


@dataclass(frozen=True)
class Recipe:
    """The settings of one training.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step; what does not fill a last batch waits for the next epoch's shuffle.
        lr: Peak learning rate.
        momentum: Of SGD, without Nesterov's look-ahead.
        weight_decay: L2 penalty on every parameter.
        bn_l1: L1 penalty on the scales of batch normalisations, for methods that look at these.
        schedule: ``"cosine"`` to zero, ``"steps"`` (x 0.1 at 1/2 and 3/4 of the run), or ``"constant"``.
        warmup: Epochs over which the learning rate rises linearly from zero.
        augment: ``"none"``, ``"crop"`` (pad by 1/8, crop at random), ``"crop-flip"`` (and mirror half of them).
        precision: ``"auto"`` (bfloat16 autocast where that is faster), ``"bfloat16"`` or ``"float32"``.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    bn_l1: float = 0.0
    schedule: str = "cosine"
    warmup: float = 1.0
    augment: str = "none"
    precision: str = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            least = {"epochs": 1, "batch_size": 2}.get(field.name, 0)
            if kind is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not kind:
                raise UserError(f"Recipe {field.name} is {value!r}; it must be of type {kind.__name__}.")
            if kind is not str and not math.isfinite(value):
                raise UserError(f"Recipe {field.name} is {value!r}; it must be finite.")
            if kind is not str and value < least:
                raise UserError(f"Recipe {field.name} is {value}; it must be at least {least}.")
        choose(self.schedule, SCHEDULES, "schedule")
        choose(self.augment, AUGMENTATIONS, "augmentation")
        choose(self.precision, PRECISIONS, "precision")

    def steps_per_epoch(self, n_images: int) -> int:
        """Return the number of full batches in n images."""
        if n_images < self.batch_size:
            raise UserError(f"batch_size {self.batch_size} exceeds the {n_images} training images: make it smaller.")
        return n_images // self.batch_size

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step (counted from the start of training)."""
        total, rise = self.epochs * steps_per_epoch, self.warmup * steps_per_epoch
        if step < rise:
            return self.lr * (step + 1) / rise
        done = (step - rise) / max(1, total - rise)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "steps":
            return self.lr * 0.1 ** sum(step >= share * total for share in (0.5, 0.75))
        return self.lr


def recipe_from(settings: Mapping[str, object]) -> Recipe:
    """Build a recipe from a mapping; an unknown key raises `UserError` with a suggestion."""
    if not isinstance(settings, Mapping):
        raise UserError(f"A recipe is a mapping of {', '.join(f.name for f in fields(Recipe))}; not {settings!r}.")
    for name in settings:
        choose(name, [field.name for field in fields(Recipe)], "recipe key")
    return Recipe(**settings)
