"""Damage anywhere in a small store or among recorded results: seen before a run, set aside, made again, or said."""

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import yaml

from lthlib import data
from lthlib.book import make, plan
from lthlib.book.grid import read_grid
from lthlib.core import versions
from lthlib.core.errors import UserError
from lthlib.core.store import MANIFEST, ROOT, Store, seal
from lthlib.results import recorded
from lthlib.results.collect import rows_of
from lthlib.results.evaluate import evaluate
from lthlib.results.recorded import read_records, recorded_json

GRID = {
    "data": "mnist5k",
    "arch": "resnet8",
    "methods": ["lth"],
    "rounds": [1],
    "seeds": [0],
    "train_size": 200,
    "recipe": {"epochs": 1, "batch_size": 50, "warmup": 0.0},
    "dimensions": {"generalization": {"n_test": 50, "n_ood": 20, "n_corrupted": 10, "n_attack": 10, "n_pgd": 2}},
}
KINDS = ("corrupted", "data", "evaluations", "ood", "predictions", "rewind-points", "tickets")
NEEDED = ("evaluations", "tickets", "predictions")  # what rows and pages are read from
JOBS = ("dense-s0", "lth-s0")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"[" * 3000),
}


def table(grid, store):
    (study,), ((name, given),) = grid.studies, grid.dimensions.items()
    return rows_of([evaluate(ticket, name, store, given, grid.precision) for ticket in study.tickets()], name)


def in_folder(patch, root):
    patch.setattr(plan, "BUILD", root / "_build")
    patch.setattr(make, "BOOK", root / "_build/book.json")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished grid: its file, its store, its stamps, its table."""
    root = tmp_path_factory.mktemp("small")
    (root / "small.yml").write_text(yaml.safe_dump(GRID))
    with pytest.MonkeyPatch.context() as patch:
        in_folder(patch, root)
        patch.setenv("LTHLIB_STORE", str(root / "store"))
        grid = read_grid(root / "small.yml")
        for job in plan.jobs(grid):
            make.tickets(str(root / "small.yml"), job.study, job.method, job.seed, plan.stamp(grid, job.name))
        return root, table(grid, Store())


@pytest.fixture
def copy(small, tmp_path, monkeypatch):
    """A copy of it, to be damaged."""
    root, found = small
    shutil.copytree(root, tmp_path / "copy")
    in_folder(monkeypatch, tmp_path / "copy")
    return tmp_path / "copy", read_grid(tmp_path / "copy/small.yml"), found


def artifact_of(store, kind):
    """An artifact of the LTH ticket where the kind knows tickets, else any."""
    keys = [key for key in store.list() if key.split("/")[0] == kind]
    return next((key for key in keys if "-lth-" in key), keys[0])


def again(grid, root):
    """The jobs that a run has to go through."""
    make.clear_stale(grid, Store(root / "store"))
    return [job.name.split("/")[1] for job in plan.jobs(grid) if not plan.stamp(grid, job.name).exists()]


def test_these_are_all_kinds_of_artifacts(small):
    assert {key.split("/")[0] for key in Store(small[0] / "store").list()} == set(KINDS)


def test_a_whole_store_is_left_alone(copy):
    root, grid, _ = copy
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert again(grid, root) == []
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert before == after


@pytest.mark.parametrize("of", ["content", "manifest"])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_set_aside_and_the_job_behind_it_runs_again(copy, kind, of, capsys):
    root, grid, _ = copy
    store = Store(root / "store")
    key = artifact_of(store, kind)
    files = sorted(path for path in store.path(key).iterdir() if path.name != MANIFEST)
    flip(files[-1] if of == "content" else store.path(key) / MANIFEST)
    assert again(grid, root) == (["lth-s0"] if kind in NEEDED else [])
    assert store.path(key).exists() == (kind == "data")  # which are looked at on the spot
    assert len(list((root / "store/damaged").iterdir())) == 1
    assert f"damaged: {store.path(key)}" in capsys.readouterr().err


def test_what_was_damaged_is_made_again_with_the_same_numbers(copy):
    root, grid, found = copy
    store = Store(root / "store")
    keys = [artifact_of(store, kind) for kind in KINDS]
    for key, damage in zip(keys, [*DAMAGES.values(), *DAMAGES.values()], strict=False):
        damage(sorted(store.path(key).iterdir())[-1])
    make.clear_stale(grid, store)
    pd.testing.assert_frame_equal(table(grid, Store(root / "store")), found)
    assert all(Store(root / "store").path(key).exists() for key in keys if key.split("/")[0] in NEEDED)


@pytest.mark.parametrize("name", [".DS_Store", "notes.txt"])
@pytest.mark.parametrize("kind", ["evaluations", "predictions"])
def test_a_file_that_something_else_left_between_results_harms_none(copy, kind, name):
    root, grid, _ = copy
    store = Store(root / "store")
    (store.path(artifact_of(store, kind)).parent / name).write_text("x")
    assert again(grid, root) == []
    assert not (root / "store/damaged").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stamp_does_not_count(copy, damage):
    root, grid, _ = copy
    DAMAGES[damage](plan.stamp(grid, "mnist5k-resnet8/lth-s0"))
    assert again(grid, root) == ["lth-s0"]


def test_another_jobs_stamp_does_not_count(copy):
    root, grid, _ = copy
    dense, lth = (plan.stamp(grid, f"mnist5k-resnet8/{job}") for job in JOBS)
    lth.write_bytes(dense.read_bytes())
    assert again(grid, root) == ["lth-s0"]


@pytest.mark.parametrize(
    ("change", "jobs"),
    [
        ({"recipe": {"epochs": 3}}, list(JOBS)),
        ({"dimensions": {"calibration": {"n_bins": 7}}}, list(JOBS)),
        ({"title": "Another title"}, []),
        ({"thresholds": {"tolerance": 0.02}}, []),
    ],
)
def test_other_settings_need_the_jobs_that_depend_on_them(copy, change, jobs):
    root, _, _ = copy
    path = root / "small.yml"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, **change}))
    assert again(read_grid(path), root) == jobs


@pytest.mark.parametrize(
    ("module", "jobs"),
    [
        ("lthlib.pruning.lottery", ["lth-s0"]),
        ("lthlib.pruning.snip", []),
        ("lthlib.training.loop", list(JOBS)),
        ("lthlib.metrics.generalization.measure", list(JOBS)),
        ("lthlib.metrics.generalization.accuracy", list(JOBS)),
        ("lthlib.metrics.calibration.measure", []),
        ("lthlib.core.store", []),
        ("lthlib.figures", []),
    ],
)
def test_other_code_needs_the_jobs_that_depend_on_it(copy, monkeypatch, module, jobs):
    root, grid, _ = copy
    monkeypatch.setitem(versions._TEXTS, module, versions._TEXTS[module] + "\n_ADDED = True\n")
    versions._version.cache_clear()
    try:
        assert again(grid, root) == jobs
    finally:
        versions._version.cache_clear()


def test_other_images_under_the_same_name_need_all_jobs(copy, monkeypatch):
    root, grid, _ = copy
    load = data.load
    monkeypatch.setattr(data, "load", lambda *given: replace(load(*given), digest="other"))
    assert again(grid, root) == list(JOBS)


def test_a_missing_artifact_is_made_again(copy):
    root, grid, _ = copy
    shutil.rmtree(root / "store/evaluations")
    assert again(grid, root) == list(JOBS)


RECORDED = sorted(path.name for path in (ROOT / "book/results/methods").iterdir())


@pytest.mark.parametrize("damage", ["flipped", "missing"])
@pytest.mark.parametrize("name", RECORDED)
def test_damage_among_recorded_results_is_named_with_what_to_do(tmp_path, monkeypatch, name, damage):
    folder = tmp_path / "book/results/methods"
    shutil.copytree(ROOT / "book/results/methods", folder)
    monkeypatch.setattr(recorded, "ROOT", tmp_path)
    DAMAGES[damage](folder / name)
    with pytest.raises(UserError) as error:
        read_records(tmp_path / "book/results")
    assert name == MANIFEST or name in str(error.value)  # a flipped sum in it looks like damage to a file
    assert "git checkout -- book/results/methods" in str(error.value)


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_recorded_latency_is_named_with_what_to_do(tmp_path, monkeypatch, damage):
    path = tmp_path / "book/results/latency.json"
    path.parent.mkdir(parents=True)
    path.write_text(seal({"rows": [1.5]}))
    assert recorded_json(path) == {"rows": [1.5]}
    assert json.loads(path.read_text())["rows"] == [1.5]
    monkeypatch.setattr(recorded, "ROOT", tmp_path)
    DAMAGES[damage](path)
    with pytest.raises(UserError, match=r"git checkout -- book/results/latency\.json"):
        recorded_json(path)
