"""The whole path on a tiny grid, in a copy of the checkout: images, tickets, pages, a strict book, and again."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import yaml
from sklearn.metrics import log_loss, roc_auc_score

from lthlib.book.labs import MADE
from lthlib.book.plan import recorded_grids
from lthlib.pruning import METHODS
from lthlib.results.collect import COLUMNS
from lthlib.results.evaluate import DIMENSIONS
from lthlib.results.recorded import read_records

ROOT = Path(__file__).parents[1]

SMALL = {"generalization": {"n_test": 300}, "calibration": {"n_test": 300}}
GRID = {
    "title": "A tiny grid",
    "data": "mnist5k",
    "arch": "resnet8",
    "methods": ["lth", "snip"],
    "rounds": [2, 4],
    "seeds": [0, 1],
    "recipe": {"epochs": 2, "batch_size": 64},
    "train_size": 500,
}


LOOK = """
from lthlib.book import grid, make
from lthlib.core.store import Store
make.clear_stale(grid.read_grid("workflow/grids/tiny.yml"), Store())
"""  # what a run begins with


def copy_of_the_checkout(folder):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("book/results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    if MADE.exists():  # labs that are current are not made again; tests of their own run them
        shutil.copytree(MADE, folder / MADE.relative_to(ROOT))
    return folder


def test_a_new_method_leaves_recorded_results_as_they_were(monkeypatch):
    """Studies of all methods were recorded before it was there; the book is to show them all the same."""
    monkeypatch.setitem(METHODS, "brand-new", METHODS["omp"])
    kept = {record.entry["ticket"] for record in read_records(ROOT / "book/results").values()}
    wanted = {ticket.id for grid in recorded_grids("") for study in grid.studies for ticket in study.tickets()}
    assert wanted == kept


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = copy_of_the_checkout(tmp_path_factory.mktemp("a checkout"))
    quick = yaml.safe_load((ROOT / "workflow/grids/quick.yml").read_text())["dimensions"]
    dimensions = {name: {**(quick[name] or {}), **SMALL.get(name, {})} for name in DIMENSIONS}
    (folder / "workflow/grids/tiny.yml").write_text(yaml.safe_dump({**GRID, "dimensions": dimensions}))
    return folder


def report(checkout, grid="workflow/grids/tiny.yml", **variables):
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", **variables}
    environment.pop("LTHLIB_STORE", None)
    return subprocess.run(
        [sys.executable, "workflow/report.py", grid, "--cores", "2"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def done(checkout):
    result = report(checkout)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def test_it_says_where_book_and_rows_lie(checkout, done):
    named = dict(re.findall(r"^(book|rows): (.*)$", done.stdout, flags=re.M))
    assert Path(named["book"]).is_file()
    assert Path(named["rows"]).is_file()


@pytest.fixture(scope="module")
def rows(checkout, done):
    return pd.read_csv(checkout / "book/_generated/tiny/rows.csv")


def test_rows_are_complete_and_finite(rows):
    assert tuple(rows.columns) == COLUMNS
    assert np.isfinite(rows["value"]).all()
    assert set(rows["dimension"]) == set(DIMENSIONS)
    for (_, metric, *_), part in rows.groupby(["dimension", "metric", "shift", "severity"]):
        dense = 1 if metric == "churn" else 2  # between the two
        assert sorted(part["method"].value_counts().items()) == [("dense", dense), ("lth", 4), ("snip", 4)]
        assert not part.duplicated(["method", "sparsity", "seed"]).any()


def test_costs_stand_beside_the_rows(checkout, rows):
    costs = pd.read_csv(checkout / "book/_generated/tiny/costs.csv").set_index("ticket")
    assert set(costs.index) == set(rows["ticket"])
    assert costs.index.is_unique
    for ticket, line in costs.iterrows():
        cost = json.loads((checkout / "store/tickets" / ticket / "ticket.json").read_text())["cost"]
        assert line[list(cost)].to_dict() == pytest.approx(cost)
        assert line["bytes"] == (checkout / "store/tickets" / ticket / "weights.safetensors").stat().st_size
    first = costs[costs["method"] != "dense"].groupby("method")["trainings"].min()
    assert first["lth"] > first["snip"] == 1


def test_every_row_can_be_traced(checkout, rows):
    made = pd.read_csv(checkout / "book/_generated/tiny/provenance.csv").set_index(["ticket", "dimension"])
    assert made.index.is_unique
    assert set(made.index) == set(rows[["ticket", "dimension"]].itertuples(index=False, name=None))
    for name in ("commit", "python", "torch", "numpy", "processor", "blas", "device", "precision", "threads", "time"):
        assert made[[name, f"trained_{name}"]].notna().all(axis=None)
    assert (made["trained_time"] <= made["time"]).all()


def test_metrics_equal_an_independent_recomputation_from_the_stored_logits(checkout, rows):
    store = checkout / "store"
    for ticket, part in list(rows.groupby("ticket"))[:4]:
        value = part.set_index(["dimension", "metric", "shift"])["value"]
        (folder,) = (store / "predictions" / ticket).glob("test-300-*")
        logits, labels = np.load(folder / "logits.npy").astype(np.float64), np.load(folder / "labels.npy")
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        assert value["calibration", "nll", "none"] == pytest.approx(log_loss(labels, probabilities, labels=range(10)))
        right = (logits.argmax(1) == labels).mean()
        assert value["generalization", "test_accuracy", "none"] == pytest.approx(right)
        confidence, hit = probabilities.max(1), logits.argmax(1) == labels
        bins = np.minimum((np.ceil(confidence * 15) - 1).astype(int), 14)
        ece = sum(abs((hit[bins == b] - confidence[bins == b]).sum()) for b in range(15)) / len(labels)
        assert value["calibration", "ece", "none"] == pytest.approx(ece)
        (foreign,) = (store / "predictions" / ticket).glob("ood-photos-*")
        other = np.load(foreign / "logits.npy").astype(np.float64)
        other = np.exp(other - other.max(1, keepdims=True))
        other = (other / other.sum(1, keepdims=True)).max(1)
        truth = np.r_[np.zeros(len(labels)), np.ones(len(other))]
        auroc = roc_auc_score(truth, -np.r_[confidence, other])
        assert value["generalization", "ood_auroc", "photos"] == pytest.approx(auroc, abs=1e-6)


def test_densities_of_the_stored_masks_are_those_of_the_rows(checkout, rows):
    for ticket, part in rows.groupby("ticket"):
        masks = checkout / "store/tickets" / ticket / "masks.safetensors"
        if masks.exists():
            kept = np.concatenate([m.ravel() for m in safetensors.numpy.load_file(masks).values()])
            assert part["sparsity"].iloc[0] == pytest.approx(1 - kept.mean(), abs=1e-12)
        else:
            assert (part["sparsity"] == 0).all()


def test_every_page_of_the_contents_is_built_and_has_figures(checkout, done):
    toc = yaml.safe_load((checkout / "book/_generated/_toc.yml").read_text())
    files = re.findall(r"'file': '([^']+)'", str(toc))
    assert len([f for f in files if f.startswith("_generated/tiny")]) >= 3 * len(DIMENSIONS)
    for file in files:
        page = checkout / "_build/html" / f"{file}.html"
        assert page.is_file()
        if file.endswith("comparison"):
            assert "<img" in page.read_text()


def test_a_dry_run_says_once_what_a_run_would_do_and_does_not_say_that_it_is_done(checkout, done):
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "workflow/report.py", "workflow/grids/tiny.yml", "--", "--dry-run"]
    said = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert said.returncode == 0
    assert said.stdout.count("Nothing to be done") == 1
    assert "Nothing to be done" not in said.stderr
    assert "book: " not in said.stdout


def test_a_second_run_changes_nothing_and_is_quick(checkout, done):
    kept = {p: p.stat().st_mtime_ns for p in (checkout / "store").rglob("*.json") if "jobs" not in p.parts}
    pages = {p: p.stat().st_mtime_ns for p in (checkout / "book/_generated").rglob("*.ipynb")}
    assert report(checkout).returncode == 0
    assert all(p.stat().st_mtime_ns == t for p, t in {**kept, **pages}.items())


def test_a_missing_page_alone_asks_for_a_run(checkout, done):
    """As a killed run leaves it; the book itself is whole, and newer. (That no other page is made: below.)"""
    page = checkout / "book/_generated/tiny/mnist5k-resnet8/calibration/snip.ipynb"
    stamp = checkout / "_build/stamps/book.json"
    content, whole = page.read_bytes(), stamp.read_bytes()
    look = [sys.executable, "-c", LOOK]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    subprocess.run(look, cwd=checkout, env=environment, check=True)
    assert stamp.exists()
    page.unlink()
    subprocess.run(look, cwd=checkout, env=environment, check=True)
    assert not stamp.exists()
    page.write_bytes(content)
    stamp.write_bytes(whole)


def test_two_runs_at_once_make_a_damaged_ticket_again_once_and_with_the_same_bits(checkout, done, rows):
    """Nothing else asks for a run: the outputs behind the ticket are whole and newer."""
    ticket = rows.loc[rows["method"] == "snip", "ticket"].iloc[0]
    weights = checkout / "store/tickets" / ticket / "weights.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[: len(before) // 2])
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "workflow/report.py", "workflow/grids/tiny.yml", "--cores", "2"]
    runs = [
        subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [run.communicate(timeout=600)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert sum("another run is under way in this checkout" in text for text in said) == 1
    assert weights.read_bytes() == before
    (aside,) = (checkout / "store/damaged").iterdir()
    assert sum(aside.name in text for text in said) == 1
    pd.testing.assert_frame_equal(pd.read_csv(checkout / "book/_generated/tiny/rows.csv"), rows)


def test_a_killed_run_leaves_no_worker_and_the_next_one_finishes(checkout, done):
    """kill -9 in the middle of the trainings of another seed; then again."""
    grid = yaml.safe_load((checkout / "workflow/grids/tiny.yml").read_text())
    one = next(iter(grid["dimensions"]))
    small = {**grid, "methods": ["rp"], "rounds": [3], "dimensions": {one: grid["dimensions"][one]}}
    (checkout / "workflow/grids/killed.yml").write_text(yaml.safe_dump(small))
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, "workflow/report.py", "workflow/grids/killed.yml", "--cores", "2"],
        cwd=checkout,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while not list((checkout / "_build/logs/killed").rglob("rp-*.log")) and time.time() < deadline:
        time.sleep(0.2)
    run.kill()
    run.wait()
    time.sleep(2)
    ours = subprocess.run(
        ["pgrep", "-f", f"{checkout}|grids/killed.yml"], capture_output=True, text=True
    ).stdout.split()
    assert ours == []
    result = report(checkout, "workflow/grids/killed.yml")
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(pd.read_csv(checkout / "book/_generated/killed/rows.csv")) > 0


def test_a_failing_page_is_named_marked_in_the_book_and_replaced_by_the_next_good_run(checkout, done):
    template = checkout / "notebooks/calibration.ipynb"
    generated, html = checkout / "book/_generated", checkout / "_build/html/_generated/tiny/mnist5k-resnet8"
    content = json.loads(template.read_text())
    broken = json.loads(template.read_text())
    code = [c for c in broken["cells"] if c["cell_type"] == "code"][-1]
    code["source"] = ["raise ArithmeticError('made to fail')"]
    template.write_text(json.dumps(broken))
    try:
        result = report(checkout)
        assert result.returncode == 1
        named = re.findall(r"(\S+), cell (\d+) .*ArithmeticError: made to fail.*: (\S+)$", result.stderr, flags=re.M)
        assert {file for _, _, file in named} == {
            str(path.relative_to(checkout)) for path in generated.glob("tiny/*/calibration/*.failed.ipynb")
        }
        assert {(Path(name).name, int(cell)) for name, cell, _ in named} == {
            ("calibration.ipynb", 1 + broken["cells"].index(code))
        }
        assert "book, with what is missing marked" in result.stderr
        stub = re.sub(r"<[^>]+>", "", (html / "calibration/lth-missing.html").read_text())
        assert "ArithmeticError: made to fail" in stub
        assert "make report GRID=workflow/grids/tiny.yml" in stub
        assert not (html / "calibration/lth.html").exists()
        assert (html / "flatness/lth.html").exists()
        assert "(missing)" in (html / "calibration/comparison-missing.html").read_text()  # in the contents beside it
    finally:
        template.write_text(json.dumps(content))
    others = {p: p.stat().st_mtime_ns for p in (generated / "tiny").rglob("*.ipynb") if "calibration" not in p.parts}
    assert report(checkout).returncode == 0
    assert all(p.stat().st_mtime_ns == t for p, t in others.items())
    assert (html / "calibration/lth.html").exists()
    for folder in (generated, checkout / "_build/html"):
        assert not [p for p in folder.rglob("*") if "-missing" in p.name or ".failed" in p.name]
    assert "(missing)" not in (html / "calibration/comparison.html").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ["lht"]}, "Did you mean 'lth'"),
        ({"sede": [1]}, "Did you mean 'seeds'"),
        ({"rounds": [3, 2]}, "ascending"),
    ],
)
def test_a_mistaken_grid_ends_before_anything_is_written(checkout, change, words):
    (checkout / "workflow/grids/wrong.yml").write_text(
        yaml.safe_dump({**GRID, "dimensions": {"calibration": {}}, **change})
    )
    result = report(checkout, "workflow/grids/wrong.yml")
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (checkout / "book/_generated/wrong").exists()
    (checkout / "workflow/grids/wrong.yml").unlink()


def test_a_template_runs_alone_under_plain_papermill_and_refuses_a_mistyped_parameter(checkout, done, tmp_path):
    """papermill itself only warns of an unknown parameter, and would run with the default."""
    base = [
        sys.executable,
        "-m",
        "papermill",
        "notebooks/calibration.ipynb",
        str(tmp_path / "out.ipynb"),
        "--no-progress-bar",
    ]
    small = {k: GRID[k] for k in ("rounds", "seeds", "recipe", "train_size")} | {"recorded": None}
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    good = subprocess.run(
        [*base, "-y", yaml.safe_dump(small), "-p", "method", "lth"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert good.returncode == 0, good.stderr[-2000:]
    bad = subprocess.run(
        [*base, "-y", yaml.safe_dump(small), "-p", "metod", "lth"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert bad.returncode != 0
    assert "Did you mean 'method'" in bad.stderr
