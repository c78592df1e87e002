"""Which code a result depends on, as a hash of whole source files.

A result is made by some modules; it depends on their files and on the files of this package that those import.
`code_version` hashes these without comments, docstrings and blank lines, so that a better comment makes nothing again,
and neither does a new method or metric, which no other file imports. The rooms `core` (no number depends on stores and
errors) and `data` (images are known by their digests) stay out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

_LIBRARY = Path(__file__).resolve().parents[1]
_LEFT_OUT = ("core", "data")


def _name(path: Path) -> str:
    return ".".join(("lthlib", *path.relative_to(_LIBRARY).with_suffix("").parts)).removesuffix(".__init__")


_TEXTS = {_name(path): path.read_text() for path in sorted(_LIBRARY.rglob("*.py"))}
"""The package as it was when this process began, which is what this process runs. A file that is edited later belongs
to the next process: what this one finishes in the meantime must not pass for a result of the new text."""


def code_version(*makers: Callable | str) -> str:
    """Return 12 hexadecimal digits that change with some modules, with what they import of this package, and with the
    releases (first two numbers) of the other packages that all these import.

    Makers are names of modules, such as ``lthlib.training.loop``, or functions and classes defined in them.
    """
    return _version(frozenset(maker if isinstance(maker, str) else maker.__module__ for maker in makers))


@functools.cache
def _version(modules: frozenset[str]) -> str:
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found and module in _TEXTS:
            found.add(module)
            waiting += [m for m in imported(_TEXTS[module]) if _room(m) not in _LEFT_OUT or _room(m) == _room(module)]
    foreign = {name.partition(".")[0] for module in found for name, _ in _imports(_TEXTS[module])}
    releases = [_release(name) for name in sorted(foreign - sys.stdlib_module_names - {_LIBRARY.name})]
    return digest([*releases, *(f"{module}\n{_stripped(_TEXTS[module])}" for module in sorted(found))])


@functools.cache
def _release(package: str) -> str:
    """Return name and release of what is installed under an imported name; patches within a release change nothing."""
    for distribution in _distributions().get(package, ()):
        return " ".join([distribution, *metadata.version(distribution).split(".")[:2]])
    return f"{package} is not installed"


_distributions = functools.cache(metadata.packages_distributions)


def _room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def modules_of(room: str) -> list[str]:
    """Return the modules of a room of this package."""
    return [module for module in _TEXTS if _room(module) == room]


def imported(code: str) -> list[str]:
    """Return the modules of this package that some code imports, at its head or later."""
    return [inner if inner in _TEXTS else outer for outer, inner in _imports(code) if {inner, outer} & _TEXTS.keys()]


@functools.cache
def _imports(code: str) -> list[tuple[str, str]]:
    """Return pairs of a module and of what is imported from it, which may be a module, too."""
    pairs = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            pairs += [(node.module, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Import):
            pairs += [(alias.name, alias.name) for alias in node.names]
    return pairs


def digest(texts: Iterable[str]) -> str:
    """Return 12 hexadecimal digits of the SHA-256 of some texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


@functools.cache
def _stripped(code: str) -> str:
    """Return code without comments, docstrings and layout."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = kept or [ast.Pass()]
    return ast.unparse(tree)
