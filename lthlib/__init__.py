"""Can you win everything with a lottery ticket? The library behind the book.

The rooms, in the order in which they may import one another:
core -> data, networks -> pruning -> training -> tickets -> metrics -> results -> figures -> book -> own

The names below are what a notebook needs; they are imported when they are first used.
"""

import importlib

__version__ = "0.1.0"

PLACES = {
    "prune": "lthlib.pruning.any_network",
    "apply": "lthlib.pruning.any_network",
    "scores": "lthlib.pruning.any_network",
    "sparsity": "lthlib.pruning.any_network",
    "train": "lthlib.training.loop",
    "Recipe": "lthlib.training.recipe",
    "METHODS": "lthlib.pruning",
    "METRICS": "lthlib.metrics",
    "Ticket": "lthlib.tickets.ticket",
    "obtain": "lthlib.tickets.obtain",
    "evaluate": "lthlib.results.evaluate",
    "compare": "lthlib.own",
    "Store": "lthlib.core.store",
}


def __getattr__(name: str) -> object:
    """Import a name of `PLACES`, or a room, when it is first asked for."""
    if name in PLACES:
        return getattr(importlib.import_module(PLACES[name]), name)
    if name in ("metrics", "figures", "data", "networks", "pruning"):
        return importlib.import_module(f"lthlib.{name}")
    raise AttributeError(f"lthlib has no {name!r}; at its top are {', '.join(PLACES)}.")
