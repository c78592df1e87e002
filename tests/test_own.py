"""Networks from files: what is said of them is what is said of the same networks as tickets."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune

from lthlib import data, own
from lthlib.__main__ import main
from lthlib.book.grid import grid_from
from lthlib.core.errors import UserError
from lthlib.data.corrupted import sample
from lthlib.networks.inputs import as_input
from lthlib.networks.weights import used_weights
from lthlib.own.command import normalisation
from lthlib.own.subject import Label, OwnSubject, digest, few_images
from lthlib.own.words import summary
from lthlib.pruning import masks
from lthlib.results import verdict
from lthlib.results.collect import collect
from lthlib.tickets.obtain import obtain
from lthlib.tickets.study import study_from
from lthlib.tickets.ticket import Ticket
from lthlib.training.loop import Recipe

TINY = Recipe(epochs=2, batch_size=50, warmup=0.0, precision="float32")

DIMENSIONS = {
    "generalization": {"n_test": 200, "n_ood": 50, "n_corrupted": 10, "n_attack": 20, "n_pgd": 4},
    "calibration": {"n_test": 200, "n_corrupted": 10, "n_bootstrap": 20},
}


@pytest.fixture(scope="module")
def settings():
    dense = Ticket(data="mnist5k", arch="resnet8", recipe=TINY, train_size=500)
    return {
        "data": dense.data,
        "arch": dense.arch,
        "methods": ["omp"],
        "rounds": [4],
        "seeds": [0],
        "recipe": vars(dense.recipe),
        "train_size": dense.train_size,
    }


@pytest.fixture(scope="module")
def plan(settings):
    return grid_from("mine", {**settings, "dimensions": DIMENSIONS, "precision": "float32"})


@pytest.fixture(scope="module")
def networks(plan, store):
    dense, sparse = plan.studies[0].tickets()
    return obtain(dense, store), obtain(sparse, store)


def reparametrised(trained):
    """As `torch.nn.utils.prune` leaves a network, under DataParallel, beside an optimizer."""
    model = trained.model
    for name, mask in trained.masks.items():
        prune.custom_from_mask(model.get_submodule(name.removesuffix(".weight")), "weight", mask)
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    return {"epoch": 3, "state_dict": weights}


@pytest.fixture(scope="module")
def files(networks, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    dense, sparse = networks
    torch.save(dense.model.state_dict(), folder / "dense.pt")
    safetensors.torch.save_file(sparse.model.state_dict(), folder / "plain.safetensors")
    torch.save(reparametrised(obtain(sparse.ticket, store)), folder / "split.pth")
    return folder


@pytest.mark.parametrize("name", ["plain.safetensors", "split.pth"])
def test_numbers_are_those_of_the_same_networks_as_tickets(plan, files, store, monkeypatch, name):
    monkeypatch.setenv("LTHLIB_STORE", str(store.root))
    found = own.compare_files(plan, files / "dense.pt", [files / name], "resnet8")
    rows, judged = found.rows, found.judged
    for dimension, parameters in DIMENSIONS.items():
        expected = collect(plan.studies[0], dimension, store, parameters=parameters, precision="float32").rows
        mine = rows[rows["dimension"] == dimension]
        keys = ["metric", "shift", "severity", "n"]
        assert mine[keys].to_numpy().tolist() == expected[keys].to_numpy().tolist()
        np.testing.assert_allclose(mine["value"], expected["value"], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(mine["sparsity"], expected["sparsity"])
    said = summary(found, Path(name).stem)
    (passed,) = verdict.lth_pass(judged)["passed"]
    assert ("LTH-PASS" in said) == passed
    assert f"{100 * judged['sparsity'].iloc[0]:.1f} %" in said


def test_the_other_dimensions_measure_a_network_from_outside(files, plan, networks, store):
    dense, sparse = networks
    images = plan.studies[0].data
    few = {
        "flatness": {
            "n_weights": 8,
            "n_spectrum": 8,
            "n_pixels": 8,
            "n_noise": 8,
            "n_path": 8,
            "points": 3,
            "n_wide": 8,
        },
        "interpretability": {"n_images": 2, "n_masks": 20, "n_concept_images": 20, "draws": 19},
    }
    size = dense.ticket.train_size
    rows = own.compare(dense.model, {"mine": sparse.model}, images, store=store, dimensions=few, train_size=size).rows
    values = rows.set_index(["method", "metric"])["value"]
    assert values["dense", "loss_barrier"] == 0.0
    ticket = collect(
        study_from(
            {
                "data": images,
                "arch": "resnet8",
                "methods": ["omp"],
                "rounds": [4],
                "recipe": vars(dense.ticket.recipe),
                "train_size": dense.ticket.train_size,
            }
        ),
        "flatness",
        store,
        parameters=few["flatness"],
    ).rows
    barrier = ticket[(ticket["metric"] == "loss_barrier") & (ticket["method"] == "omp")]["value"].item()
    assert values["mine", "loss_barrier"] == pytest.approx(barrier, rel=1e-5, abs=1e-7)
    assert np.isfinite(rows["value"]).all()


class Other(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, stride=4), nn.Linear(4 * 7 * 7, classes)

    def forward(self, x):
        return self.fc(self.features(x))

    def features(self, x):
        return torch.relu(self.conv(x)).flatten(1)


def taught(model, store, order=range(10)):
    """Fit the last layer by least squares, so that the network is a classifier; the classes come in some order."""
    images = data.load("mnist5k", store).train
    with torch.no_grad():
        seen = model.features(as_input(images.pixels))
        seen = torch.cat([seen, torch.ones(len(seen), 1)], 1).double()
        goal = 20 * nn.functional.one_hot(torch.tensor([*order]).argsort()[images.labels], 10).double() - 10
        found = torch.linalg.solve(seen.T @ seen + torch.eye(seen.shape[1]), seen.T @ goal)
        model.fc.weight.copy_(found[:-1].T)
        model.fc.bias.copy_(found[-1])
    return model


@pytest.fixture(scope="module")
def other(store):
    torch.manual_seed(0)
    return taught(Other(), store).eval()


FEW = {"calibration": DIMENSIONS["calibration"]}


def values(rows, metric="test_accuracy"):
    return rows[(rows["metric"] == metric) & (rows["shift"] == "none")].set_index("method")["value"]


def test_a_network_of_any_class_is_measured_and_left_as_it_was(other, store):
    dense, pruned = copy.deepcopy(other).train(), copy.deepcopy(other)
    pruned.conv.weight.data[:2] = 0
    dense.fc.weight.grad = torch.ones_like(dense.fc.weight)
    rows = own.compare(dense, {"half": pruned}, "mnist5k", store=store, dimensions=FEW).rows
    assert set(rows.loc[rows["method"] == "half", "sparsity"]) == {0.5}
    assert dense.training
    assert not pruned.training
    assert dense.fc.weight.requires_grad
    assert dense.fc.weight.grad is not None
    with pytest.raises(UserError, match=r"seven: .*\(7,\); .* 10 logits"):
        own.compare(dense, {"seven": Other(7)}, "mnist5k", store=store, dimensions=FEW)
    for name in ("dense", "dense-long"):
        with pytest.raises(UserError, match="cannot be named"):
            own.compare(dense, {name: pruned}, "mnist5k", store=store, dimensions=FEW)
    with pytest.raises(UserError, match="soft: The network returns probabilities"):
        own.compare(dense, {"soft": nn.Sequential(pruned, nn.Softmax(1))}, "mnist5k", store=store, dimensions=FEW)


class Masked(Other):
    """A mask that no state dict and no `str` shows."""

    mask = 1.0

    def forward(self, x):
        return super().forward(x * self.mask)


def test_networks_that_differ_in_a_plain_attribute_are_told_apart(other, store):
    dense = Masked()
    dense.load_state_dict(other.state_dict())
    pruned = copy.deepcopy(dense)
    pruned.mask = (torch.rand(28, 28, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    few = few_images(data.load("mnist5k", store))
    assert digest(dense, few) != digest(pruned, few)
    families = [OwnSubject(Label("mnist5k", "m", 0, "x"), m, None, store).family for m in (dense, pruned, dense)]
    assert families[0] == families[2] != families[1]
    found = values(own.compare(dense, {"masked": pruned}, "mnist5k", store=store, dimensions=FEW).rows)
    test = data.load("mnist5k", store).test
    test = test.subset(sample(test.labels, 200))
    with torch.no_grad():
        for name, model in (("dense", dense), ("masked", pruned)):
            expected = (model(as_input(test.pixels)).argmax(1) == test.labels).double().mean().item()
            assert found[name] == pytest.approx(expected)
    assert found["masked"] < found["dense"] - 0.02


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (
            lambda net, store: taught(net, store, order=[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]),
            "another order .*in order: 0, 1, 2",
        ),
        (lambda net, store: nn.Sequential(net, nn.Softmax(1)), "returns probabilities"),
        (lambda net, store: nn.Sequential(net, nn.Sigmoid()), "returns probabilities"),
        (lambda net, store: Other(), "no better than guessing .*order of the classes .*normalisation"),
        (lambda net, store: nn.Sequential(net, nn.Dropout(0.5), Active()), "dense: .*draws random numbers"),
    ],
)
def test_no_verdict_without_a_dense_network_that_can_be_compared_with(other, store, wrap, words):
    torch.manual_seed(1)
    with pytest.raises(UserError, match=words):
        own.compare(wrap(copy.deepcopy(other), store), {"mine": other}, "mnist5k", store=store, dimensions=FEW)


class Active(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5)  # in evaluation mode, too


class LeNet300(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def features(self, x):
        return self.b(self.a(x.view(len(x), -1)).relu()).relu()

    def forward(self, x):
        return self.fc(self.features(x))


def test_linear_layers_are_pruned_too(store):
    torch.manual_seed(0)
    dense = taught(LeNet300(), store)
    pruned = copy.deepcopy(dense)
    layers = [(layer, "weight") for layer in (pruned.a, pruned.b, pruned.fc)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)
    rows = own.compare(dense, {"half": pruned}, "mnist5k", store=store, dimensions=FEW).rows
    assert rows.loc[rows["method"] == "half", "sparsity"].iloc[0] == pytest.approx(0.5)
    assert prune.is_pruned(pruned)  # as found
    with pytest.raises(UserError, match="Allowed: conv, linear, all"):
        own.compare(dense, {"half": pruned}, "mnist5k", store=store, dimensions=FEW, prunable="convolution")


def test_the_mask_is_the_zeros(networks, store):
    _, sparse = networks
    found = OwnSubject(Label("mnist5k", "mine", 1, "x"), sparse.model, None, store).trained.masks
    assert found.keys() == sparse.masks.keys()
    assert all(torch.equal(found[name], mask) for name, mask in sparse.masks.items())
    few = few_images(data.load("mnist5k", store))
    expected = 1 - masks.n_kept(found) / sum(m.numel() for m in found.values())
    used = used_weights(sparse.model, few)
    assert own.sparsity(used, used, "conv") == pytest.approx(expected)


def test_the_untrained_network_keeps_nothing_of_training(store):
    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.norm = nn.Parameter(torch.linspace(0, 1, 784)), nn.BatchNorm1d(784)

    model = Free()
    fresh = OwnSubject(Label("mnist5k", "mine", 1, "x"), model, None, store).untrained()
    assert not torch.equal(fresh.scale, model.scale)
    assert torch.equal(fresh.scale.sort().values, model.scale)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("images", ((0.1,), (0.3,))),
        ("none", ((0.0,), (1.0,))),
        ("0.5/0.25", ((0.5,), (0.25,))),
        ("0.5/0", "needs a mean and a deviation above 0"),
        ("0.5", "must be images, none, imagenet or"),
        ("1,2/1,2", "have 1 channels"),
        ("a/b", "must be images, none, imagenet or"),
    ],
)
def test_what_a_network_of_the_registry_does_with_pixels_is_the_callers_choice(given, expected):
    grey = SimpleNamespace(name="grey", channels=1, mean=(0.1,), std=(0.3,))
    if isinstance(expected, tuple):
        assert normalisation(given, grey) == expected
    else:
        with pytest.raises(UserError, match=expected):
            normalisation(given, grey)


NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 7 * 7, 10)

    def features(self, x):
        return torch.relu(self.norm(self.conv(x))).flatten(1)

    def forward(self, x):
        return self.fc(self.features(x))
"""

CONFIG = """
precision: float32
dimensions:
  calibration: {n_test: 100, n_corrupted: 5, n_bootstrap: 20}
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, store):
    """A folder with a network of somebody else's, its weights in four forms, and a config."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "theirs.py").write_text(NETWORK)
    (folder / "mine.yaml").write_text(CONFIG)
    scope: dict = {}
    exec(NETWORK, scope)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = scope["Net"]().eval()
    taught(model, store)
    safetensors.torch.save_file(model.state_dict(), folder / "dense.safetensors")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({**weights, "conv.weight": 0 * weights["conv.weight"]}, folder / "empty.pt")
    torch.save({**weights, "fc.bias": weights["fc.bias"] / 0}, folder / "broken.pt")
    torch.save({"conv.weight": weights["conv.weight"]}, folder / "other.pt")
    torch.save(nn.Linear(2, 2), folder / "whole.pt")
    prune.l1_unstructured(model.conv, "weight", amount=0.5)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / "half.pt")
    return folder


def test_the_command_judges_networks_from_files(foreign, store):
    root = Path(own.__file__).parents[2]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "lthlib",
            "check",
            *[
                "dense.safetensors",
                "half.pt",
                "empty.pt",
                "--data",
                "mnist5k",
                "--network",
                "theirs:Net",
                "--config",
                "mine.yaml",
            ],
            *["--rows", "rows.csv", "--json", "verdict.json", "--report", "report.html"],
        ],
        cwd=foreign,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "LTHLIB_STORE": str(store.root)},
    )
    assert run.returncode in (0, 2, 3), run.stderr
    assert "half: 50.0 % of the prunable weights are zero or gone" in run.stdout
    assert "empty: 100.0 % of the prunable weights are zero or gone" in run.stdout
    assert run.stdout.count(" kept. ") == 2
    assert (run.returncode == 0) == (run.stdout.count("LTH-PASS") == 2)
    rows = pd.read_csv(foreign / "rows.csv")
    assert set(rows["method"]) == {"dense", "half", "empty"}
    assert rows.groupby("method")["sparsity"].first().to_dict() == {"dense": 0, "half": 0.5, "empty": 1}
    assert rows["value"].notna().all()
    assert run.stderr.startswith("Assumed: pixels in [0, 1], 1 x 28 x 28, normalised by the network itself")
    assert "10 classes in the order 0, 1, 2" in run.stderr
    assert "half keeps 50.0 % (conv 50 %)" in run.stderr
    verdicts = json.loads((foreign / "verdict.json").read_text())
    assert verdicts["status"] == run.returncode
    assert verdicts["networks"]["half"]["sparsity"] == 0.5
    (ece,) = (line for line in verdicts["networks"]["half"]["metrics"] if line["metric"] == "ece")
    assert ece["pruned"] - ece["dense"] == pytest.approx(ece["shortfall"])
    check_report((foreign / "report.html").read_text(), run.stdout)


def check_report(page, said):
    """It loads nothing, begins with the verdict, and says it as the terminal does."""
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)|https?://|<script|<link|@import", page)
    text = re.sub(r"<style>.*?</style>|<[^>]+>", "", page, flags=re.S)
    for name in ("half", "empty"):
        line = next(line for line in said.splitlines() if " kept. " in line)
        assert text.index(name) < text.index("Each measurement")
        assert line in text
    for word in ("--config mine.yaml", "Not measured", "It was not asked for"):
        assert word in text
    assert page.count("<img ") >= 4
    assert "Traceback" not in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.pt"], "There is no file nowhere.pt"),
        (["broken.pt"], "fc.bias in broken.pt holds numbers that are not finite"),
        (["other.pt"], "other.pt does not fit the network: it lacks conv.bias"),
        (["half.pt", "--network", "resnet8"], "does not fit the network"),
        (["half.pt", "--network", "resnet9"], "There is no network 'resnet9'. Did you mean"),
        (["half.pt", "--data", "minst5k"], "Did you mean 'mnist5k'"),
        (["half.pt", "--data", ""], "Name the images: --data"),
        (["half.pt", "--normalise", "0.5"], "must be images, none, imagenet or"),
        (["half.pt", "--report", "no/where.html"], "cannot be written: name a file in a folder that exists"),
        (["whole.pt"], "beside tensors it holds"),
        (["half.pt", "--network", "theirs:Nett"], "There is no function 'theirs:Nett'"),
        (["half.pt", "--network", "theirs:nn"], "'theirs:nn' is no function without arguments"),
        (["half.pt", "--network", "theirs:nn.Linear"], "There is no function 'theirs:nn.Linear'"),
        (["half.pt", "--network", "torch:relu"], "'torch:relu' is no function without arguments"),
        (["half.pt", "--network", "builtins:dict"], "'builtins:dict' returns a dict, no network"),
    ],
)
def test_the_command_says_in_a_sentence_what_is_wrong(foreign, store, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(foreign)
    monkeypatch.syspath_prepend(str(foreign))
    monkeypatch.setenv("LTHLIB_STORE", str(store.root))
    network = [] if "--network" in arguments else ["--network", "theirs:Net"]
    images = [] if "--data" in arguments else ["--data", "mnist5k"]
    before = set(foreign.iterdir())
    assert main(["check", "dense.safetensors", *arguments, *network, "--config", "mine.yaml", *images]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert words in said
    assert set(foreign.iterdir()) == before  # nothing half-written
