"""The counts behind an estimate are those of the trainings that really happen."""

import collections
import math
import re

import pytest
import torch
from torch import nn

from lthlib import data
from lthlib.book import cost as estimate
from lthlib.book.grid import grid_from, read_grid
from lthlib.core.errors import UserError
from lthlib.core.store import ROOT, Store
from lthlib.tickets import obtain as tickets
from lthlib.tickets.study import study_from

STUDY = {
    "data": "mnist5k",
    "arch": "resnet8",
    "methods": ["lth", "rp", "snip", "lth-reinit"],
    "rounds": [2],
    "seeds": [0],
    "recipe": {"epochs": 2, "batch_size": 48, "precision": "float32"},
    "rewind_epoch": 1,
    "train_size": 100,
}


def lines(grid, throughput=1.0):
    return estimate.table(grid, collections.defaultdict(lambda: throughput)).to_dict("records")


def test_every_training_is_counted_once_with_its_epochs_and_images(tmp_path, monkeypatch):
    really = collections.Counter()
    seen = collections.Counter()
    train = tickets.train

    def watched(model, images, recipe, **options):
        end, history = train(model, images, recipe, **options)
        really[len(history)] += 1
        seen["images"] += len(history) * recipe.steps_per_epoch(len(images)) * recipe.batch_size
        return end, history

    monkeypatch.setattr(tickets, "train", watched)
    study = study_from(STUDY)
    for ticket in study.tickets():
        tickets.obtain(ticket, Store(tmp_path))
    # dense, snip, reinit; the rewind point (1 epoch), a chain of two rewound tickets, rp from the rewind point.
    assert really == {2: 3, 1: 1 + 2 + 1}
    assert collections.Counter(epochs for _, epochs in estimate.trained(study)) == really
    (line,) = lines(grid_from("tiny", {**STUDY, "dimensions": ["calibration"]}))
    assert line["images"] == seen["images"]
    assert line["networks"] == really.total() - 1  # a rewind point is no network of its own


def test_a_control_brings_the_tickets_it_stands_on_even_where_the_grid_does_not_name_them():
    alone = estimate.trained(study_from({**STUDY, "methods": ["lth-reinit"], "rounds": [3]}))
    methods = collections.Counter(ticket.method for ticket, _ in alone)
    assert methods == {"dense": 2, "lth": 3, "lth-reinit": 1}


def test_dense_as_long_as_lth_is_one_training_of_the_tickets_whole_history():
    study = study_from({**STUDY, "methods": ["lth", "dense-long"], "rounds": [3]})
    runs = estimate.trained(study)
    history = sum(epochs for ticket, epochs in runs if ticket.method in ("dense", "lth")) - study.rewind_epoch
    assert [epochs for ticket, epochs in runs if ticket.method == "dense-long"] == [history]


def test_seeds_share_nothing():
    one = estimate.trained(study_from(STUDY))
    two = estimate.trained(study_from({**STUDY, "seeds": [0, 5]}))
    assert len(two) == 2 * len(one)


def test_the_size_known_without_the_data_is_that_of_the_data(store):
    images = data.load("mnist5k", store)
    assert estimate.SIZES["mnist5k"] == estimate.Images(len(images.train), images.shape, len(images.classes))


def test_a_training_step_multiplies_three_times_what_a_forward_pass_does():
    """Counted by torch over forward and backward; the first layer needs no gradient of its input."""
    from torch.utils.flop_counter import FlopCounterMode

    images = estimate.Images(1, (3, 32, 32), 10)
    model = estimate._build("resnet20s", images)
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(model(torch.rand(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    forward = estimate.macs("resnet20s", images)
    first = 32 * 32 * 16 * 27
    assert counter.get_total_flops() / 2 / 2 == pytest.approx(3 * forward - first, rel=1e-3)


def test_hours_are_work_over_throughput():
    grid = read_grid(ROOT / "workflow/grids/paper.yml", recorded=True)
    found = {line["study"]: line for line in lines(grid, 2e12)}
    assert len(found) == 8
    line = found["cifar10-resnet20s"]
    # Three seeds of: dense and its rewind point; 21 tickets of each of seven methods, four of them from scratch.
    epochs = 3 * (182 + 9 + 21 * (4 * 182 + 3 * (182 - 9)))
    images = epochs * (45_000 // 256) * 256
    assert line["networks"] == 3 * (1 + 7 * 21)
    assert line["images"] == images
    macs = 41_000_000  # of ResNet-20 at 32 x 32, as its paper counts them
    assert line["hours"] == pytest.approx(images * 3 * macs / 2e12 / 3600, rel=0.02)


def test_the_papers_grid_is_the_papers():
    small = read_grid(ROOT / "workflow/grids/paper.yml", recorded=True)
    large = read_grid(ROOT / "workflow/grids/paper-imagenet.yml", recorded=True)
    assert {(s.data, s.arch) for s in small.studies} == {
        (data_, arch)
        for data_ in ("cifar10", "cifar100")
        for arch in ("resnet20s", "resnet18", "wrn-28-10", "vgg16-bn")
    }
    assert [(s.data.split("@")[0], s.arch) for s in large.studies] == [("imagenet", "resnet50")]
    for study in (*small.studies, *large.studies):
        assert set(study.methods) == {"rp", "omp", "lth", "snip", "grasp", "synflow", "rigl"}
    assert math.isclose(1 - 0.8 ** small.studies[0].rounds[-1], 0.9908, abs_tol=1e-4)


def test_unknown_data_and_a_senseless_throughput_are_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("LTHLIB_DATA", str(tmp_path))
    with pytest.raises(UserError, match="What training on nowhere"):
        lines(grid_from("x", {**STUDY, "data": "nowhere", "dimensions": ["calibration"]}))
    with pytest.raises(UserError, match="throughput is -1"):
        estimate.estimate(str(ROOT / "workflow/grids/quick.yml"), throughput=-1.0)


def test_the_chapters_table_adds_up_and_says_where_no_throughput_is_recorded(monkeypatch, tmp_path):
    text = estimate.chapter_table()
    hours = [float(cell.replace(",", "")) for cell in re.findall(r"\| ([\d,]+) \|$", text, flags=re.M)]
    total = float(re.search(r"\*\*([\d,]+)\*\*", text)[1].replace(",", ""))
    assert len(hours) == 9
    assert sum(hours) == pytest.approx(total, rel=0.05)
    monkeypatch.setattr(estimate, "THROUGHPUT", tmp_path / "none.json")
    assert "No throughput is recorded" in estimate.chapter_table()
