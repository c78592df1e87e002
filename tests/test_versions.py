"""Which results are made again after a change to the code: those whose files, or what they import, say something else."""

import subprocess
import sys
from pathlib import Path

import pytest

from lthlib.core import versions
from lthlib.core.versions import code_version
from lthlib.pruning import METHODS

MODULES = {
    "lthlib.probe.a": 'from lthlib.probe import b\nfrom lthlib.data import images\n\ndef f():\n    """Doc."""\n    return b.g()\n',
    "lthlib.probe.b": "def g():\n    from lthlib.probe.c import h\n    return h()\n",
    "lthlib.probe.c": "import numpy\nfrom lthlib.core import store\n\ndef h():\n    return 1  # one\n",
    "lthlib.probe.other": "x = 1\n",
    "lthlib.data.images": "y = 1\n",
    "lthlib.core.store": "z = 1\n",
}


@pytest.fixture
def texts(monkeypatch):
    found = dict(MODULES)
    monkeypatch.setattr(versions, "_TEXTS", found)
    versions._version.cache_clear()
    yield found
    versions._version.cache_clear()


def version(texts, module="lthlib.probe.a"):
    versions._version.cache_clear()
    return code_version(module)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("lthlib.probe.a", "b.g()", "b.g() + 0"),
        ("lthlib.probe.b", "return h()", "return -h()"),
        ("lthlib.probe.c", "return 1", "return 2"),
        ("lthlib.probe.c", "import numpy", "import scipy as numpy"),  # another package under the same name
    ],
)
def test_it_changes_with_what_it_depends_on(texts, module, old, new):
    before = version(texts)
    assert old in texts[module]
    texts[module] = texts[module].replace(old, new)
    assert version(texts) != before


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("lthlib.probe.a", "Doc.", "Another text."),
        ("lthlib.probe.c", "  # one", "  # said better"),
        ("lthlib.probe.b", "\n    return", "\n\n    return"),
        ("lthlib.probe.other", "x = 1", "x = 2"),
        ("lthlib.data.images", "y = 1", "y = 2"),  # images are known by their digest
        ("lthlib.core.store", "z = 1", "z = 2"),
    ],
)
def test_it_does_not_change_with_anything_else(texts, module, old, new):
    before = version(texts)
    assert old in texts[module]
    texts[module] = texts[module].replace(old, new)
    assert version(texts) == before


@pytest.mark.parametrize(("release", "same"), [("9.9.1", False), ("{0}.{1}.9999", True)])
def test_it_changes_with_the_release_of_a_package_that_is_imported(texts, monkeypatch, release, same):
    before, alone = version(texts), version(texts, "lthlib.probe.other")
    really = versions.metadata.version
    given = lambda name: release.format(*really(name).split(".")) if name == "numpy" else really(name)
    monkeypatch.setattr(versions.metadata, "version", given)
    versions._release.cache_clear()
    try:
        assert (version(texts) == before) == same
        assert version(texts, "lthlib.probe.other") == alone
    finally:
        versions._release.cache_clear()


def test_code_of_a_room_that_is_left_out_counts_where_it_is_asked_for(texts):
    before = version(texts, "lthlib.data.images")
    texts["lthlib.data.images"] = "y = 3"
    assert version(texts, "lthlib.data.images") != before


def test_each_method_has_a_version_of_its_own():
    assert code_version(METHODS["snip"].find) != code_version(METHODS["grasp"].find)


def test_a_file_edited_under_a_running_process_does_not_change_what_that_process_calls_its_code(tmp_path):
    package = tmp_path / "lthlib"
    (package / "core").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "core/__init__.py").write_text("")
    (package / "core/versions.py").write_text(Path(versions.__file__).read_text())
    (package / "probe.py").write_text("x = 1\n")
    code = (
        "import pathlib\nfrom lthlib.core.versions import code_version, _version\n"
        "before = code_version('lthlib.probe')\n"
        f"pathlib.Path({str(package / 'probe.py')!r}).write_text('x = 2')\n"
        "_version.cache_clear()\nassert code_version('lthlib.probe') == before"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PYTHONPATH": str(tmp_path)})
