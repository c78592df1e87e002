"""What torture does to runs and files, and whether it would notice."""

import os
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest

from lthlib.book.zygote import ROOT, VARIABLE, zygote

sys.path.insert(0, str(ROOT / "workflow"))
import torture


@pytest.mark.skipif(sys.platform != "linux", reason="torture reads /proc")
def test_a_page_is_told_from_its_kernel_and_from_who_asked_for_it(tmp_path):
    """A kernel's standard output is a pipe, like Snakemake's."""
    cells = ["n = 1", "from pathlib import Path\nPath('begun').touch()\nimport time\ntime.sleep(600)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path / "template.ipynb")
    log = tmp_path / "_build/jobs/grid/pages/page.log"
    log.parent.mkdir(parents=True)
    checkout = object.__new__(torture.Checkout)
    checkout.folder = tmp_path
    with zygote(["ipykernel.kernelapp", "papermill.execute"]) as address, log.open("w") as output:
        client = subprocess.Popen(
            [sys.executable, "-m", "lthlib.book.fork", "lthlib.book.runner", "template.ipynb", "page.ipynb"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: address},
            stdout=output,
            stderr=output,
        )
        deadline = time.monotonic() + 300
        while not (tmp_path / "begun").exists():
            assert client.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        found = checkout.processes(driver=-1)
        client.kill()
        client.wait()
    assert found.pop("client") == [client.pid]
    ((page,), (kernel,)) = found.pop("page"), found.pop("kernel")
    assert found == {}
    assert page != kernel
    assert checkout.processes_left() == []


@pytest.mark.parametrize("way", torture.WAYS)
def test_every_way_to_damage_a_file_does(tmp_path, way):
    content, other = bytes(range(100)), bytes(range(100, 0, -1))
    (tmp_path / "other").write_bytes(other)
    for seed in range(50):
        path = tmp_path / f"file{seed}"
        path.write_bytes(content)
        assert torture.WAYS[way](path, [tmp_path / "other"], random.Random(seed))
        assert not path.is_file() or path.read_bytes() != content
    (tmp_path / "same").write_bytes(content)
    (tmp_path / "twin").write_bytes(content)
    if way == "another's":
        assert not torture.WAYS[way](tmp_path / "same", [tmp_path / "twin"], random.Random(0))
        assert not torture.WAYS[way](tmp_path / "same", [], random.Random(0))


def test_contents_are_the_same_only_bit_for_bit():
    one = {"values": [1.0, {"a": 2}], "array": np.array([1.0, np.nan], np.float32)}
    assert torture.same(one, {"values": [1.0, {"a": 2}], "array": np.array([1.0, np.nan], np.float32)})
    last_bit = np.nextafter(np.float32(1), np.float32(2))
    for key, other in (
        ("array", np.array([last_bit, np.nan], np.float32)),
        ("array", np.array([1.0, np.nan])),
        ("array", np.array([[1.0, np.nan]], np.float32)),
        ("values", [1.0, {"a": 3}]),
        ("more", 1),
    ):
        assert not torture.same(one, {**one, key: other})
    assert not torture.same(b"a", b"b")


def test_a_finished_run_is_judged_by_what_is_missing_new_different_and_left(tmp_path):
    checkout = object.__new__(torture.Checkout)
    checkout.folder, checkout.temporary = tmp_path / "c", tmp_path / "c-tmp"
    checkout.rows = checkout.folder / "rows.csv"
    for folder in (checkout.folder / "store/tmp", checkout.folder / "store/rewind-points/a", checkout.temporary):
        folder.mkdir(parents=True)
    checkout.rows.write_text("1")
    (checkout.folder / "store/rewind-points/a/state.safetensors").write_bytes(b"s")
    expected = torture.contents(checkout)
    assert expected == {"rows.csv": b"1", "rewind-points/a/state.safetensors": b"s"}
    outcome = torture.Outcome()
    torture.judge(checkout, expected, outcome, clear=False)
    assert outcome.faults == []
    checkout.rows.write_text("2")
    (checkout.folder / "store/rewind-points/a/state.safetensors").rename(checkout.folder / "store/x.safetensors")
    (checkout.temporary / "left").touch()
    (checkout.folder / ".page.1.tmp").touch()
    torture.judge(checkout, expected, outcome, clear=False)
    assert [fault.split(":")[0] for fault in outcome.faults] == [
        "missing",
        "not in the reference",
        "different",
        "left behind",
        "left behind",
    ]
    outcome.faults.clear()
    torture.judge(checkout, expected, outcome, may_lack=("rewind-points/",), clear=False)
    assert "missing" not in {fault.split(":")[0] for fault in outcome.faults}


@pytest.mark.parametrize("ends_in_spite_of_it", [False, True])
def test_the_end_after_the_last_kill_is_judged_once(tmp_path, monkeypatch, ends_in_spite_of_it):
    victim = SimpleNamespace(rows=tmp_path / "rows.csv", ended=False)

    def one_run(checkout, lives, rng, outcome, most):
        outcome.killed["zygote"] += min(most, 1)
        checkout.ended = ends_in_spite_of_it or not most
        if checkout.ended:
            checkout.rows.touch()

    judged = []

    def judge(checkout, expected, outcome):
        judged.append(checkout.rows.read_bytes())
        checkout.rows.unlink()

    monkeypatch.setattr(torture, "one_run", one_run)
    monkeypatch.setattr(torture, "judge", judge)
    outcome = torture.Outcome()
    torture.kill(victim, {}, {}, 1, random.Random(0), outcome)
    assert outcome.n_kills == 1
    assert len(judged) == 1
