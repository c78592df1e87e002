"""Errors that speak to the person, and the registries whose unknown names get a suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Something the person can mend: one sentence that says what was wrong, what is allowed, what to do."""


def suggest(name: object, allowed: Iterable[object]) -> str:
    """Return ``' Did you mean x?'`` for the nearest allowed name, or an empty string where none is near."""
    near = difflib.get_close_matches(str(name).lower(), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def choose(name: object, allowed: Iterable[object], kind: str) -> None:
    """Raise `UserError` unless ``name`` is one of ``allowed``.

    Args:
        name: What the person wrote.
        allowed: What may be written.
        kind: What it names, in the singular ("method", "grid key"), for the message.

    Raises:
        UserError: With the nearest allowed name and the whole list.
    """
    allowed = list(allowed)
    if name not in allowed:
        raise UserError(
            f"Unknown {kind} {name!r}.{suggest(name, allowed)} Allowed: {', '.join(map(str, allowed)) or 'none'}."
        )


class Registry(dict[str, T], Generic[T]):
    """Names to entries, in the order of registration; an unknown name raises `UserError` with a suggestion.

    >>> colours = Registry("colour")
    >>> colours["blue"] = 1
    >>> colours["bleu"]
    Traceback (most recent call last):
        ...
    lthlib.errors.UserError: Unknown colour 'bleu'. Did you mean 'blue'? Allowed: blue.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def __missing__(self, name: object) -> T:
        choose(name, self, self.kind)
        raise KeyError(name)  # unreachable: choose() has raised

    def __setitem__(self, name: str, entry: T) -> None:
        if name in self:
            raise ValueError(f"two entries for the {self.kind} {name!r}")
        super().__setitem__(name, entry)
