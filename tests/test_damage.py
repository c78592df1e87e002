"""Damage anywhere in a small store or among recorded results: seen before a run, set aside, made again, or said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from lthlib import data
from lthlib.book import front as report
from lthlib.book import generated, verify
from lthlib.book.grid import read_grid
from lthlib.core import versions as code_version
from lthlib.core.errors import UserError
from lthlib.core.store import MANIFEST, ROOT, Store, seal
from lthlib.results import evaluate
from lthlib.results.evaluate import Archive, recorded_json

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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished grid: its file, its store, the files that say what is done, its table."""
    root = tmp_path_factory.mktemp("small")
    (root / "small.yml").write_text(yaml.safe_dump(GRID))
    with pytest.MonkeyPatch.context() as patch:
        for module in (report, generated, verify):
            patch.setattr(module, "ROOT", root)
        shutil.copytree(ROOT / "notebooks", root / "notebooks")
        patch.setenv("LTHLIB_STORE", str(root / "store"))
        grid = read_grid(root / "small.yml")
        for job in report.jobs(grid):
            report.tickets(str(root / "small.yml"), job.study, job.method, job.seed, report.done_file(grid, job))
        return root, report.table(grid, Store())


@pytest.fixture
def copy(small, tmp_path, monkeypatch):
    """A copy of it, to be damaged."""
    root, table = small
    shutil.copytree(root, tmp_path / "copy")
    for module in (report, generated, verify):
        monkeypatch.setattr(module, "ROOT", tmp_path / "copy")
    return tmp_path / "copy", read_grid(tmp_path / "copy/small.yml"), table


def artifact_of(store, kind):
    """An artifact of the LTH ticket where the kind knows tickets, else any."""
    keys = [key for key in store.list() if key.split("/")[0] == kind]
    return next((key for key in keys if "-lth-" in key), keys[0])


def again(grid, root):
    """The jobs that a run has to go through."""
    return sorted(
        Path(name).stem for name in verify.stale(grid, Store(root / "store")) if name.startswith("_build/jobs/")
    )


def test_these_are_all_kinds_of_artifacts(small):
    assert {key.split("/")[0] for key in Store(small[0] / "store").list()} == set(KINDS)


def test_a_whole_store_is_left_alone(copy):
    root, grid, _ = copy
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert again(grid, root) == []
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert before == after


@pytest.mark.parametrize("of", ["content", "manifest"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_set_aside_and_the_job_behind_it_runs_again(copy, kind, damage, of, capsys):
    root, grid, _ = copy
    store = Store(root / "store")
    key = artifact_of(store, kind)
    files = sorted(path for path in store.path(key).iterdir() if path.name != MANIFEST)
    DAMAGES[damage](files[-1] if of == "content" else store.path(key) / MANIFEST)
    assert again(grid, root) == (["lth-s0"] if kind in NEEDED else [])
    assert store.path(key).exists() == (kind == "data")  # which are looked at on the spot
    assert len(list((root / "store/damaged").iterdir())) == 1
    assert f"damaged: {store.path(key)}" in capsys.readouterr().err


def test_a_mere_look_says_what_is_damaged_and_leaves_it(copy, capsys):
    """A dry run is to change nothing."""
    root, grid, _ = copy
    flip(Store(root / "store").path(artifact_of(Store(root / "store"), "tickets")) / "weights.safetensors")
    generated.write(root / "book/_generated/small/rows.csv", "x", "y")
    (root / "book/_generated/small/rows.csv").write_text("damaged")
    done_files(root)[0].write_text("damaged")
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"}
    looked = verify.stale(grid, Store(root / "store"), look=True)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"} == before
    assert capsys.readouterr().err.count("damaged: ") == 2
    assert sorted(looked) == sorted(verify.stale(grid, Store(root / "store")))


def test_what_was_damaged_is_made_again_with_the_same_numbers(copy):
    root, grid, table = copy
    store = Store(root / "store")
    keys = [artifact_of(store, kind) for kind in KINDS]
    for key, damage in zip(keys, [*DAMAGES.values(), *DAMAGES.values()], strict=False):
        damage(sorted(store.path(key).iterdir())[-1])
    verify.stale(grid, store)
    pd.testing.assert_frame_equal(report.table(grid, Store(root / "store")), table)
    assert all(Store(root / "store").path(key).exists() for key in keys if key.split("/")[0] in NEEDED)


def test_damage_to_a_table_hides_none_to_the_book(copy, capsys):
    """Else the next build would go on from the damaged one, and take it for what it wrote."""
    root, grid, _ = copy
    paths = root / "book/_generated/small/rows.csv", root / "_build/html/index.html"
    generated.write(paths[0], "x")
    paths[1].parent.mkdir(parents=True)
    paths[1].write_text("x")
    generated.note_book(generated.book_sources(), finished=True)
    for path in paths:
        path.write_text("damaged")
    verify.stale(grid, Store(root / "store"))
    said = capsys.readouterr().err
    assert all(f"damaged: {path}: " in said for path in paths)


@pytest.mark.parametrize("name", [".DS_Store", "notes.txt"])
@pytest.mark.parametrize("kind", ["evaluations", "predictions"])
def test_a_file_that_something_else_left_between_results_harms_none(copy, kind, name):
    root, grid, _ = copy
    store = Store(root / "store")
    (store.path(artifact_of(store, kind)).parent / name).write_text("x")
    assert again(grid, root) == []
    assert not (root / "store/damaged").exists()


def done_files(root):
    return [next((root / "_build").rglob(f"{job}.json")) for job in JOBS]


def into_a_folder(path):
    path.unlink()
    path.mkdir()
    (path / "x").touch()


@pytest.mark.parametrize("damage", [*DAMAGES.values(), into_a_folder], ids=[*DAMAGES, "a folder"])
def test_damaged_word_that_a_job_is_done_does_not_count(copy, damage, capsys):
    root, grid, _ = copy
    damage(done_files(root)[1])
    assert again(grid, root) == ["lth-s0"]
    if damage is not DAMAGES["missing"]:
        assert "lth-s0.json" in capsys.readouterr().err


def test_damaged_logits_are_made_again_though_the_job_is_not_done_either(copy):
    """With its evaluations whole, a job that is gone through would not ask for them."""
    root, grid, table = copy
    store = Store(root / "store")
    key = artifact_of(store, "predictions")
    flip(store.path(key) / "logits.npy")
    done_files(root)[1].unlink()
    verify.stale(grid, store)
    assert not store.path(key).exists()
    pd.testing.assert_frame_equal(report.table(grid, Store(root / "store")), table)
    assert store.path(key).exists()


def test_another_jobs_word_does_not_count(copy, capsys):
    root, grid, _ = copy
    dense, lth = done_files(root)
    lth.write_bytes(dense.read_bytes())
    assert again(grid, root) == ["lth-s0"]
    assert "it is another job's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "jobs"),
    [
        ({"recipe": {"epochs": 3}}, list(JOBS)),
        ({"dimensions": {"calibration": {"n_bins": 7}}}, list(JOBS)),
        ({"title": "Another title"}, []),
        ({"thresholds": {"k": 1}}, []),
    ],
)
def test_other_settings_need_the_jobs_that_depend_on_them_and_back_again_none(copy, change, jobs):
    root, grid, _ = copy
    path = root / "small.yml"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, **change}))
    assert again(read_grid(path), root) == jobs
    assert again(grid, root) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "jobs"),
    [
        ("pruners/lottery.py", "n_keep", "n_keep + 0", ["lth-s0"]),
        ("pruners/snip.py", "batch(", "batch (", []),
        ("metrics/generalization.py", "def measure(", "def  measure(", list(JOBS)),
        ("metrics/calibration.py", "def measure(", "def  measure(", []),
        ("store.py", "def sha256(", "def  sha256(", []),
    ],
)
def test_other_code_needs_the_jobs_that_depend_on_it(copy, monkeypatch, file, old, new, jobs):
    root, grid, _ = copy
    path = Path(code_version.__file__).parent / file
    assert old in path.read_text()
    monkeypatch.setitem(code_version._TEXTS, path, path.read_text().replace(old, new))
    for cached in (code_version._module, code_version._hash):
        cached.cache_clear()
    try:
        assert again(grid, root) == jobs
    finally:
        for cached in (code_version._module, code_version._hash):
            cached.cache_clear()


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


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", RECORDED)
def test_damage_among_recorded_results_is_named_with_what_to_do(tmp_path, monkeypatch, name, damage):
    folder = tmp_path / "book/results/methods"
    shutil.copytree(ROOT / "book/results/methods", folder)
    monkeypatch.setattr(evaluate, "ROOT", tmp_path)
    DAMAGES[damage](folder / name)
    with pytest.raises(UserError) as error:
        Archive.read(tmp_path / "book/results")
    assert name == MANIFEST or name in str(error.value)  # a flipped sum in it looks like damage to a file
    assert "git checkout -- book/results/methods" in str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_recorded_latency_is_named_with_what_to_do(tmp_path, monkeypatch, damage):
    path = tmp_path / "book/results/latency.json"
    path.parent.mkdir(parents=True)
    path.write_text(seal({"rows": [1.5]}))
    assert recorded_json(path) == {"rows": [1.5]}
    assert json.loads(path.read_text())["rows"] == [1.5]
    monkeypatch.setattr(evaluate, "ROOT", tmp_path)
    DAMAGES[damage](path)
    with pytest.raises(UserError, match=r"git checkout -- book/results/latency\.json"):
        recorded_json(path)
