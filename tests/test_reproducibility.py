"""What does not depend on the number of threads, and how the chapter's tables come from what was recorded."""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from lthlib import data
from lthlib.book import reproducibility
from lthlib.core.store import ROOT, seal
from lthlib.pruning import METHODS
from lthlib.pruning.masks import prunable
from lthlib.pruning.snip import saliency
from lthlib.results.evaluate import DIMENSIONS
from lthlib.results.recorded import recorded_json
from lthlib.tickets import obtain as tickets
from lthlib.tickets.obtain import new_model, training_batch
from lthlib.tickets.ticket import Ticket

BEFORE_TRAINING = [name for name, method in METHODS.items() if method.source == "init" and name != "dense"]


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def found_with(n, ticket, images):
    with threads(n):
        found = tickets._masks(ticket, None, images, n_keep=31_307)
        assert torch.get_num_threads() == n
    return found


@pytest.mark.parametrize("name", BEFORE_TRAINING)
def test_masks_before_training_are_the_same_with_one_thread_and_with_two(name, tiny, store):
    images = data.load("mnist5k", store, tiny["train_size"])
    quick = (("rounds", 10),) if name == "synflow" else ()
    ticket = Ticket(method=name, round=4, options=quick, **tiny)
    one, two = (found_with(n, ticket, images) for n in (1, 2))
    assert one.channels == two.channels
    if one.masks is not None:
        assert all(torch.equal(mask, two.masks[layer]) for layer, mask in one.masks.items())


def test_a_method_sees_one_thread_whatever_the_job_has(tiny, store, monkeypatch):
    seen = []
    monkeypatch.setattr(
        type(METHODS["snip"]), "run", lambda *_: seen.append(torch.get_num_threads()) or tickets.Found()
    )
    found_with(2, Ticket(method="snip", round=4, **tiny), data.load("mnist5k", store, tiny["train_size"]))
    assert seen == [1]


def test_scores_of_grey_images_are_as_exact_as_single_precision_allows(store):
    """Batch statistics summed in single precision move pre-activations past the kink of a ReLU, and scores by 5 %."""
    images = data.load("mnist5k", store)
    x, y = training_batch(images.train, 0)(128)
    scores = {}
    for kind in (torch.float32, torch.float64):
        model = new_model(Ticket(), images).to(kind).train()
        scores[kind] = saliency(model, prunable(model), x.to(kind), y)
    for layer, exact in scores[torch.float64].items():
        assert (scores[torch.float32][layer] - exact).abs().max() < 2e-3 * exact.abs().max()


MEASURE = """
import sys, shutil, torch
from pathlib import Path
from lthlib.results.evaluate import evaluate
from lthlib.core.store import Store
from lthlib.tickets.obtain import obtain
from lthlib.tickets.ticket import Ticket
from lthlib.training.recipe import Recipe

root = Path(sys.argv[1])
recipe = Recipe(epochs=2, batch_size=50, warmup=0.0)
ticket = Ticket(data="mnist5k", arch="resnet8", train_size=500, recipe=recipe)
obtain(ticket, Store(root))
for i, threads in enumerate((1, 2, 2)):
    torch.set_num_threads(threads)
    evaluate(ticket, "calibration", Store(root), {"n_test": 200, "n_corrupted": 5, "n_bootstrap": 20}, "float32")
    (root / "evaluations").rename(root / f"evaluations-{i}")
    shutil.rmtree(root / "predictions")
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Values and arrays of one network measured with one thread, with two, and with two again."""
    root, found = tmp_path_factory.mktemp("threads"), []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # two may share a core
    subprocess.run([sys.executable, "-c", MEASURE, str(root)], cwd=ROOT, env=environment, check=True)
    for i, threads in enumerate((1, 2, 2)):
        (folder,) = (root / f"evaluations-{i}").glob("*/*")
        content = json.loads((folder / "values.json").read_text())
        assert content["provenance"]["threads"] == threads
        with np.load(folder / "arrays.npz") as arrays:
            found.append((content["values"], {name: array.tobytes() for name, array in arrays.items()}))
    return found


def test_measuring_again_with_as_many_threads_gives_the_same_bits(measured):
    assert measured[1] == measured[2]


def test_measuring_with_two_threads_keeps_within_the_tolerance_that_the_book_states(measured):
    record = recorded_json(reproducibility.AGREEMENT)
    wanted = ("float32", "two threads a job, measuring only")
    (run,) = (r for r in record["runs"] if (r["precision"], r["way"]) == wanted)
    one, two = (pd.Series([value["value"] for value in values]) for values, _ in measured[:2])
    tolerance = run["dimensions"]["calibration"]["largest"]
    assert reproducibility.deviation(one, two).max() <= max(10 * tolerance, 1e-6)


def test_deviation_is_absolute_below_one_and_relative_above():
    found = reproducibility.deviation(pd.Series([0.25, 100.0, -3.0, 7.0]), pd.Series([0.5, 200.0, 1.0, 7.0]))
    assert found.tolist() == [0.25, 0.5, 4 / 3, 0.0]


PROVENANCE = {"time": "2026-01-02T03", "commit": "abc", "python": "3", "torch": "2", "processor": "one, 2 cores"}


def test_the_table_of_changes_counts_what_was_planned():
    record = {
        "every": {"tickets": ["a", "b"], "job": ["j"], "page": ["p", "q", "r"]},
        "changes": [
            {"change": "nothing", "tickets": []},
            {"change": "a template", "tickets": [], "page": ["q"], "book": [""]},
        ],
        "provenance": PROVENANCE,
    }
    head, _, nothing, template = reproducibility.reruns_table(record).splitlines()[:4]
    assert "networks trained (of 2) | jobs run (of 1) | pages (of 3)" in head
    assert nothing == "| nothing | 0 | 0 | 0 | – |"
    assert template == "| a template | 0 | 0 | 1 | again |"


def test_the_tables_of_agreement_say_how_many_and_how_far():
    part = {"rows": 4, "same": 3, "largest": 0.02, "median": 0.0, "metric": "ece"}
    run = {
        "precision": "float32",
        "way": "two threads a job",
        "networks": [1, 2],
        "masks_at_init": [3, 3, 0, 30],
        "masks_trained": [0, 2, 5, 1000],
        "dimensions": dict.fromkeys(DIMENSIONS, part),
    }
    given = {**run, "way": "two threads a job, measuring only"}
    record = {"runs": [run, given], "seeds": {"float32": dict.fromkeys(DIMENSIONS, part)}, "provenance": PROVENANCE}
    text = reproducibility.agreement_tables(json.loads(json.dumps(record)))
    n = len(DIMENSIONS)
    line = "1 of 2 | all 3 | 0 of 2; 0.5 % of the weights kept are others | " + f"{3 * n} of {4 * n}"
    assert line in text
    assert f"measuring only | given | given | given | {3 * n} of {4 * n} |" in text
    assert "| Calibration | 0.02 (0) | 0.02 (0) | 0.02 (0) |" in text


def test_the_chapter_says_how_to_record_what_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(reproducibility, "RERUNS", tmp_path / "reruns.json")
    assert "benchmarks/reruns.py --record" in reproducibility.chapter_tables()["reruns.md"]
    record = {"every": {"tickets": [], "job": [], "page": []}, "changes": [{"change": "all"}], "provenance": PROVENANCE}
    (tmp_path / "reruns.json").write_text(seal(record))
    assert "| all | 0 | 0 | 0 | – |" in reproducibility.chapter_tables()["reruns.md"]
