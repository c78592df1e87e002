"""Which code a result depends on, as a hash.

`code_version` follows a function through the names it uses, inside this package, and hashes the source of just those
definitions, without comments, docstrings and blank lines. So a result is made again when code that it depends on
changed, and only then: a new method does not retrain the others, a better docstring retrains nothing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import io
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Symbol = tuple[str, str]  # module, name defined at its top level
_PACKAGE = "lthlib"
_KEEPERS = frozenset(
    f"{_PACKAGE}.{name}" for name in ("core.store", "core.errors", "core.versions", "book.lifeline", "book.generated")
)
"""Modules that keep results and word errors: no number depends on them, so a change there makes nothing again."""

_TEXTS = {path: path.read_text() for path in sorted(Path(__file__).parents[1].rglob("*.py"))}
"""The package as it was when this process began, which is what this process runs. A file that is edited later belongs
to the next process: what this one finishes in the meantime must not pass for a result of the new text."""


@dataclass(frozen=True)
class _Module:
    source: dict[str, str]  # top-level name -> normalised source of its definition
    uses: dict[str, frozenset[Symbol]]  # top-level name -> what that definition refers to


def code_version(*functions: Callable) -> str:
    """Return 12 hexadecimal digits that change when the code behind any of the functions changes.

    Args:
        functions: Functions or classes defined at the top level of modules of this package.
    """
    return _hash(frozenset((function.__module__, function.__qualname__) for function in functions))


def script_version(text: str) -> str:
    """Return the same for code that is in no module, as a notebook's: of the definitions of this package that it uses.

    Args:
        text: The code; its own text is not hashed.
    """
    tree = ast.parse(text)
    imported = _imports(tree)
    used = set().union(*(_references(node, "", imported) for node in tree.body))
    return _hash(frozenset(symbol for symbol in used if symbol[0]))  # the others are the script's own names


@functools.cache
def _hash(roots: frozenset[Symbol]) -> str:
    text = "\n".join(f"{m}.{name}\n{_module(m).source[name]}" for m, name in sorted(_reached(roots)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _reached(roots: frozenset[Symbol]) -> set[Symbol]:
    """Return what some definitions use, and what that uses, as far as it bears on numbers."""
    seen: set[Symbol] = set()
    waiting = list(roots)
    while waiting:
        symbol = waiting.pop()
        if symbol in seen or symbol[0] in _KEEPERS:
            continue
        module = _module(symbol[0])
        if symbol[1] in module.source:
            seen.add(symbol)
            waiting += module.uses[symbol[1]]
    return seen


@functools.cache
def _module(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return _Module({}, {})
    path = Path(spec.origin)
    text = _TEXTS[path] if path in _TEXTS else path.read_text()
    tree = ast.parse(text)
    lines = _stripped_lines(text, tree)
    imported = _imports(tree)
    definitions: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        for defined in _defines(node):
            definitions.setdefault(defined, []).append(node)
    source, uses = {}, {}
    for defined, nodes in definitions.items():
        source[defined] = "\n".join(_span(lines, node) for node in nodes)
        uses[defined] = frozenset().union(*(_references(node, name, imported) for node in nodes))
    return _Module(source, uses)


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _imports(tree: ast.Module) -> dict[str, tuple[str, str | None]]:
    """Map each local name to (module, name in it), or (module, None) where it names the module itself."""
    found: dict[str, tuple[str, str | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == _PACKAGE:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = importlib.util.find_spec(node.module).submodule_search_locations is not None
                if is_module and importlib.util.find_spec(whole) is not None:
                    found[alias.asname or alias.name] = (whole, None)
                else:
                    found[alias.asname or alias.name] = (node.module, alias.name)
    return found


def _references(node: ast.AST, module: str, imported: dict[str, tuple[str, str | None]]) -> set[Symbol]:
    found: set[Symbol] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            origin = imported.get(part.value.id)
            if origin is not None and origin[1] is None:
                found.add((origin[0], part.attr))
        if isinstance(part, ast.Name):
            origin = imported.get(part.id)
            if origin is None:
                found.add((module, part.id))
            elif origin[1] is not None:
                found.add((origin[0], origin[1]))
    return found


def _stripped_lines(text: str, tree: ast.Module) -> list[str]:
    """Return the lines of a file with comments and docstrings blanked, indices kept."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                for row in range(value.lineno - 1, value.end_lineno):
                    lines[row] = ""
    return lines


def _span(lines: list[str], node: ast.stmt) -> str:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "\n".join(line.rstrip() for line in lines[first - 1 : node.end_lineno] if line.strip())
