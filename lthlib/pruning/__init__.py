"""Sparsification methods: a new file of this package registers itself in `METHODS`."""

import importlib
import pkgutil

from lthlib.core.errors import choose
from lthlib.pruning.registry import FAMILIES, METHODS, SOURCES, Dynamics, Found, Method, Moment, Option, method

__all__ = ["FAMILIES", "METHODS", "Dynamics", "Found", "Method", "Moment", "Option", "method"]


def _check_sources() -> None:
    """Raise `UserError` where a method's source is neither a network that there is nor another method."""
    for entry in METHODS.values():
        choose(entry.source, (*SOURCES, *(name for name in METHODS if name != entry.name)), f"source of {entry.name}")


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
_check_sources()
# By family, the paper's methods first, whatever the files are called.
_entries = sorted(METHODS.items(), key=lambda item: (FAMILIES.index(item[1].family), not item[1].paper))
METHODS.clear()
METHODS.update(_entries)
