"""Errors that speak to the person, and the registries whose unknown names get a suggestion."""

from __future__ import annotations

import difflib
import math
import reprlib
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
    """Raise `UserError` unless ``name`` is one of ``allowed``; ``kind`` says in the singular what it names."""
    allowed = list(allowed)
    if name not in allowed:
        raise UserError(
            f"Unknown {kind} {shown(name)}.{suggest(name, allowed)} Allowed: {', '.join(map(str, allowed)) or 'none'}."
        )


MOST_VALUES, MOST_LETTERS, DEEPEST = 2000, 500, 8
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 60, 60


def shown(value: object) -> str:
    """Return a value as an error shows it: `repr`, but never long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not write out integers of thousands of digits
        return f"a {type(value).__name__} too long to show"


def require(is_so: object, name: str, value: object, must: str) -> None:
    """Raise `UserError` unless something is so: it says what the value of a key is, and what it ``must`` do."""
    if not is_so:
        raise UserError(f"{name} is {shown(value)}; it must {must}.")


def check_plain(value: object, name: str) -> None:
    """Raise `UserError` unless the value of a key is plain and of sane size, whatever it may be about.

    Plain is what JSON and YAML share: null, true and false, finite numbers, text, lists, and mappings whose keys are
    text. What comes from a file may also be a date, nested without end, or small to write and huge to hold.
    """
    waiting, n_seen = [(name, value, 0)], 0
    while waiting:
        where, item, depth = waiting.pop()
        n_seen += 1
        fits = n_seen <= MOST_VALUES and depth <= DEEPEST
        require(fits, name, value, f"hold at most {MOST_VALUES} values, nested at most {DEEPEST} deep")
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str) or len(key) > MOST_LETTERS:
                    raise UserError(
                        f"{where} has the key {shown(key)}; keys must be text, of {MOST_LETTERS} letters at most."
                    )
            waiting += [(f"{where}: {key}", entry, depth + 1) for key, entry in item.items()]
        elif isinstance(item, list | tuple):
            waiting += [(where, entry, depth + 1) for entry in item]
        else:
            _check_scalar(where, item)


def _check_scalar(where: str, item: object) -> None:
    if isinstance(item, str) and len(item) > MOST_LETTERS:
        must = f"be text of {MOST_LETTERS} letters at most"
    elif isinstance(item, int) and abs(item) >= 2**63:
        must = "be a whole number below 2^63"
    elif isinstance(item, float) and not math.isfinite(item):
        must = "be finite"
    elif item is None or isinstance(item, bool | int | float | str):
        return
    else:
        must = "be null, true or false, a number, text, a list or a mapping; in quotes it is text"
    require(False, where, item, must)


class Registry(dict[str, T], Generic[T]):
    """Names to entries, in the order of registration.

    An unknown name raises `UserError`: ``Unknown colour 'bleu'. Did you mean 'blue'? Allowed: blue.``
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
