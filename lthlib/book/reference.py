"""The reference of the library in the book: a page a room, whose text Sphinx takes from the docstrings.

It is an extension of Sphinx, too: what metrics define in LaTeX for Markdown becomes formulas.
"""

from __future__ import annotations

import ast
import re

import lthlib
from lthlib.core.store import ROOT
from lthlib.core.versions import modules_of

ROOMS = ("core", "data", "networks", "pruning", "training", "tickets", "metrics", "results", "figures", "book", "own")
"""The rooms in the order in which they may import one another."""


def setup(app) -> dict[str, bool]:
    """Let Sphinx show ``$x$`` in a docstring as a formula, and read pages in parallel."""

    def formulas(app, what, name, obj, options, lines: list[str]) -> None:
        lines[:] = re.sub(r"(?<!`)\$([^$`]+)\$", r":math:`\1`", "\n".join(lines)).split("\n")

    def in_parallel(app) -> None:
        # It numbers chapters, and does not say whether that is safe in parallel. No chapter here has a number.
        app.extensions["sphinx_multitoc_numbering"].parallel_read_safe = True

    app.connect("autodoc-process-docstring", formulas)
    app.connect("builder-inited", in_parallel)
    return {"parallel_read_safe": True}


def reference_pages() -> dict[str, str]:
    """Return the pages by file name, as Markdown: an index, and one page a room."""
    return {"reference/index.md": _index(), **{f"reference/{room}.md": _room(room) for room in ROOMS}}


def _index() -> str:
    """Return the page with the names at the top, and the rooms."""
    places = {name: place + ".registry" * name.isupper() for name, place in lthlib.PLACES.items()}
    names = [f"| {{py:obj}}`lthlib.{name} <{place}.{name}>` | `{place}` |" for name, place in places.items()]
    rooms = [f"| [`lthlib.{room}`]({room}.md) | {_says(room)} |" for room in ROOMS]
    return "\n".join(
        [
            "(reference)=\n# The library",
            "What each function and class takes and returns, as its docstring says it. The rooms stand in the order in "
            "which they may import one another ([](#inside)).\n",
            "## At the top\n\n`import lthlib` gives what a notebook needs:\n",
            "| name | defined in |\n|---|---|",
            *names,
            "\n## The rooms\n\n| room | |\n|---|---|",
            *rooms,
        ]
    )


def _room(room: str) -> str:
    """Return the page of a room: a section a module."""
    sections = [f"## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n```" for name in sorted(modules_of(room))]
    return "\n\n".join([f"# `lthlib.{room}`", *sections])


def _says(room: str) -> str:
    """Return the first line of a room's docstring."""
    text = (ROOT / "lthlib" / room / "__init__.py").read_text()
    return ast.get_docstring(ast.parse(text)).split("\n")[0]
