import importlib
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lthlib.core import versions as module

BASE = {
    "a": """
        '''Docstring.'''
        from lthlib_probe import b
        from lthlib_probe.c import helper, unused
        LIMIT = 3
        TABLE = {}
        def add(name):
            def register(f):
                TABLE[name] = f
                return f
            return register
        def root(x):
            return b.inner(x) + LIMIT
        @add("other")
        def other(x):
            return helper(x)
    """,
    "b": """
        from lthlib_probe.c import helper
        def inner(x):
            # a comment
            return helper(x)
        def bystander():
            return 1
    """,
    "c": """
        def helper(x):
            '''Doc.'''
            return x
        def unused():
            return 0
    """,
}


@pytest.fixture
def version(tmp_path, monkeypatch):
    """Return a function: change to the probe package -> code version of a.root."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "_PACKAGE", "lthlib_probe")

    def measure(file=None, old="", new="", root="root"):
        package = tmp_path / "lthlib_probe"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text("")
        for name, text in BASE.items():
            text = textwrap.dedent(text)
            if name == file:
                assert old in text
                text = text.replace(old, new)
            (package / f"{name}.py").write_text(text)
        for name in [n for n in sys.modules if n.startswith("lthlib_probe")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        module._hash.cache_clear()
        module._module.cache_clear()
        return module.code_version(getattr(importlib.import_module("lthlib_probe.a"), root))

    yield measure
    module._hash.cache_clear()
    module._module.cache_clear()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("a", "+ LIMIT", "- LIMIT"),
        ("a", "LIMIT = 3", "LIMIT = 4"),
        ("b", "return helper(x)", "return helper(-x)"),
        ("c", "return x", "return x + 1"),
    ],
)
def test_it_changes_with_the_code_it_depends_on(version, file, old, new):
    assert version(file, old, new) != version()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("a", "Docstring", "Another docstring"),
        ("b", "# a comment", "# another one"),
        ("b", "return 1", "return 2"),
        ("c", "return 0", "return 5"),
        ("c", "'''Doc.'''", "'''Other words.'''"),
        ("a", "return helper(x)", "return helper(x) + 1"),  # a new entry of a registry is nobody's business
        ("b", "def bystander", "\n\n\ndef bystander"),
    ],
)
def test_it_does_not_change_with_anything_else(version, file, old, new):
    assert version(file, old, new) == version()


def test_a_registered_function_has_its_own_version(version):
    assert version("c", "return x", "return 2 * x", root="other") != version(root="other")
    assert version("a", "LIMIT = 3", "LIMIT = 4", root="other") == version(root="other")


def test_what_keeps_results_is_not_among_what_makes_them():
    from lthlib.results.evaluate import evaluate

    reached = module._reached(frozenset({(evaluate.__module__, evaluate.__qualname__)}))
    files = {name for name, _ in reached}
    assert {"lthlib.tickets.ticket", "lthlib.training.loop", "lthlib.tickets.subject", "lthlib.pruning.masks"} <= files
    assert files.isdisjoint({"lthlib.core.store", "lthlib.core.errors"})


def test_a_file_edited_under_a_running_process_does_not_change_what_that_process_calls_its_code(tmp_path):
    """What it finishes was made by the text that it imported, not by the one that lies there now."""
    package = tmp_path / "lthlib"
    shutil.copytree(Path(module.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    program = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from lthlib.data import listing
from lthlib.core import versions as code_version
path = Path(listing.__file__)
assert path.is_relative_to({str(tmp_path)!r})
function = next(f for f in vars(listing).values() if getattr(f, "__module__", "") == "lthlib.data.listing" and callable(f))
path.write_text(path.read_text().replace("def ", "def  "))
print(code_version.code_version(function))
code_version._TEXTS.clear(); code_version._module.cache_clear(); code_version._hash.cache_clear()
print(code_version.code_version(function))
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    before, after = said.stdout.split()
    assert before != after


def test_a_script_depends_on_the_definitions_that_it_uses(version):
    version()
    script = "from lthlib_probe import b\nfrom lthlib_probe.c import unused\nx = 3\nb.inner(x)"
    first = module.script_version(script)
    assert module.script_version(script + "\nprint(x)") == first
    for file, old, new, changes in (
        ("c", "return x", "return x + 1", True),
        ("c", "return 0", "return 5", False),
        ("b", "return 1", "return 2", False),
    ):
        version(file, old, new)
        module._hash.cache_clear()
        assert (module.script_version(script) != first) == changes
