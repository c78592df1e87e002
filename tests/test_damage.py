"""Damage anywhere in a small store or among recorded results: seen before a run, set aside, made again, or said."""

import json
import shutil

import pandas as pd
import pytest
import yaml

from lthlib import evaluate, generated, report
from lthlib.errors import UserError
from lthlib.evaluate import Archive, recorded_json
from lthlib.grid import read_grid
from lthlib.store import MANIFEST, ROOT, Store, seal

GRID = {
    "data": "mnist5k", "arch": "resnet8", "methods": ["lth"], "rounds": [1], "seeds": [0], "train_size": 200,
    "recipe": {"epochs": 1, "batch_size": 50, "warmup": 0.0},
    "dimensions": {"generalization": {"n_test": 50, "n_ood": 20, "n_corrupted": 10, "n_attack": 10, "n_pgd": 2}},
}  # fmt: skip
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
        patch.setattr(report, "ROOT", root)
        patch.setattr(generated, "ROOT", root)
        patch.setenv("LTHLIB_STORE", str(root / "store"))
        grid = read_grid(root / "small.yml")
        for job in report.jobs(grid):
            report.tickets(
                str(root / "small.yml"), job.study, job.method, job.seed, report.done_file(grid, job)
            )
        return root, report.table(grid, Store())


@pytest.fixture
def copy(small, tmp_path, monkeypatch):
    """A copy of it, to be damaged."""
    root, table = small
    shutil.copytree(root, tmp_path / "copy")
    monkeypatch.setattr(report, "ROOT", tmp_path / "copy")
    monkeypatch.setattr(generated, "ROOT", tmp_path / "copy")
    return tmp_path / "copy", read_grid(tmp_path / "copy/small.yml"), table


def artifact_of(store, kind):
    """An artifact of the LTH ticket where the kind knows tickets, else any."""
    keys = [key for key in store.list() if key.split("/")[0] == kind]
    return next((key for key in keys if "-lth-" in key), keys[0])


def done(root):
    return sorted(path.stem for path in (root / "_build").rglob("*.json"))


def test_these_are_all_kinds_of_artifacts(small):
    assert {key.split("/")[0] for key in Store(small[0] / "store").list()} == set(KINDS)


def test_a_whole_store_is_left_alone(copy):
    root, grid, _ = copy
    before = {
        path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"
    }
    report.verify(grid, Store(root / "store"))
    after = {
        path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"
    }
    assert before == after
    assert done(root) == list(JOBS)


@pytest.mark.parametrize("of", ["content", "manifest"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_set_aside_and_the_job_behind_it_runs_again(copy, kind, damage, of, capsys):
    root, grid, _ = copy
    store = Store(root / "store")
    key = artifact_of(store, kind)
    files = sorted(path for path in store.path(key).iterdir() if path.name != MANIFEST)
    rows = report.rows_file(grid)
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.touch()
    DAMAGES[damage](files[-1] if of == "content" else store.path(key) / MANIFEST)
    report.verify(grid, store)
    assert rows.exists() == (kind not in NEEDED)  # without it, nothing would lack what the job makes
    assert not store.path(key).exists()
    assert len(list((root / "store/damaged").iterdir())) == 1
    assert f"damaged: {store.path(key)}" in capsys.readouterr().err
    assert done(root) == (["dense-s0"] if kind in NEEDED else list(JOBS))


def test_what_was_damaged_is_made_again_with_the_same_numbers(copy):
    root, grid, table = copy
    store = Store(root / "store")
    keys = [artifact_of(store, kind) for kind in KINDS]
    for key, damage in zip(keys, [*DAMAGES.values(), *DAMAGES.values()], strict=False):
        damage(sorted(store.path(key).iterdir())[-1])
    report.verify(grid, store)
    pd.testing.assert_frame_equal(report.table(grid, Store(root / "store")), table)
    assert all(Store(root / "store").path(key).exists() for key in keys if key.split("/")[0] in NEEDED)


def done_files(root):
    return [next((root / "_build").rglob(f"{job}.json")) for job in JOBS]


def into_a_folder(path):
    path.unlink()
    path.mkdir()
    (path / "x").touch()


@pytest.mark.parametrize("damage", [*DAMAGES.values(), into_a_folder], ids=[*DAMAGES, "a folder"])
def test_damaged_word_that_a_job_is_done_is_taken_back(copy, damage, capsys):
    root, grid, _ = copy
    rows = report.rows_file(grid)
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.touch()
    damage(done_files(root)[1])
    report.verify(grid, Store(root / "store"))
    assert done(root) == ["dense-s0"]
    if damage is not DAMAGES["missing"]:
        assert "lth-s0.json" in capsys.readouterr().err
        assert not rows.exists()


def test_damaged_logits_are_made_again_though_the_job_is_not_done_either(copy):
    """With its evaluations whole, a job that is gone through would not ask for them."""
    root, grid, table = copy
    store = Store(root / "store")
    key = artifact_of(store, "predictions")
    flip(store.path(key) / "logits.npy")
    done_files(root)[1].unlink()
    report.verify(grid, store)
    assert not store.path(key).exists()
    pd.testing.assert_frame_equal(report.table(grid, Store(root / "store")), table)
    assert store.path(key).exists()


def test_a_job_whose_run_was_killed_takes_the_table_with_it(copy):
    """Beside a whole table and a whole book, which are newer, the workflow would not miss it."""
    root, grid, _ = copy
    rows = report.rows_file(grid)
    generated.write(rows, "whole")
    report.verify(grid, Store(root / "store"))
    assert rows.exists()
    report.done_file(grid, report.jobs(grid)[1]).unlink()
    report.verify(grid, Store(root / "store"))
    assert not rows.exists()


def test_another_jobs_word_does_not_count(copy, capsys):
    root, grid, _ = copy
    dense, lth = done_files(root)
    lth.write_bytes(dense.read_bytes())
    report.verify(grid, Store(root / "store"))
    assert done(root) == ["dense-s0"]
    assert "it is another job's" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [{"recipe": {"epochs": 3}}, {"dimensions": {"calibration": {"n_bins": 7}}}]
)
def test_a_look_at_a_grid_with_other_settings_takes_no_word_back(copy, change):
    """The workflow runs those jobs by itself; where the settings are changed back, nothing is left to do."""
    root, _, _ = copy
    before = done(root)
    path = root / "small.yml"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, **change}))
    report.verify(read_grid(path), Store(root / "store"))
    assert done(root) == before != []


def test_a_missing_artifact_is_made_again(copy):
    root, grid, _ = copy
    shutil.rmtree(root / "store/evaluations")
    report.verify(grid, Store(root / "store"))
    assert done(root) == []


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
