"""Networks from files: what is said of them is what is said of the same networks as tickets."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune

from lthlib import own
from lthlib.__main__ import main
from lthlib.book.grid import grid_from
from lthlib.core.errors import UserError
from lthlib.pruning import masks
from lthlib.results import verdict
from lthlib.results.evaluate import collect
from lthlib.tickets.study import study_from
from lthlib.tickets.ticket import Ticket, obtain
from lthlib.training.recipe import Recipe

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
    rows, judged = own.compare_files(plan, files / "dense.pt", [files / name])
    for dimension, parameters in DIMENSIONS.items():
        expected = collect(plan.studies[0], dimension, store, parameters=parameters, precision="float32").rows
        mine = rows[rows["dimension"] == dimension]
        keys = ["metric", "shift", "severity", "n"]
        assert mine[keys].to_numpy().tolist() == expected[keys].to_numpy().tolist()
        np.testing.assert_allclose(mine["value"], expected["value"], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(mine["sparsity"], expected["sparsity"])
    said = own.summary(judged, Path(name).stem)
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
    rows = own.compare(dense.model, {"mine": sparse.model}, images, store, few, train_size=size)
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
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def test_a_network_of_any_class_is_measured(plan, store):
    torch.manual_seed(0)
    dense, pruned = Other(), Other()
    pruned.load_state_dict(dense.state_dict())
    pruned.conv.weight.data[:2] = 0
    found = {"calibration": DIMENSIONS["calibration"]}
    rows = own.compare(dense, {"half": pruned}, plan.studies[0].data, store, found)
    assert set(rows.loc[rows["method"] == "half", "sparsity"]) == {0.5}
    with pytest.raises(UserError, match=r"\(7,\); .* 10 logits"):
        own.compare(Other(7), {"half": pruned}, plan.studies[0].data, store, found)
    with pytest.raises(UserError, match="cannot be named"):
        own.compare(dense, {"dense": pruned}, plan.studies[0].data, store, found)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "was here")


def test_a_file_runs_no_code(tmp_path):
    with (tmp_path / "evil.pt").open("wb") as file:
        pickle.dump({"state_dict": Evil(tmp_path / "trace")}, file)
    torch.save({"state_dict": Evil(tmp_path / "trace")}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(UserError, match="cannot be read as weights"):
            own.read_weights(tmp_path / name)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("fc.weight"), "lacks fc.weight"),
        (lambda w: w.update({"fc.wieght": w.pop("fc.weight")}), "Did you mean 'fc.weight'"),
        (lambda w: w.update({"fc.bias": torch.zeros(3)}), r"fc.bias .* shape \(3,\)"),
        (lambda w: w.update({"conv.weight": w["conv.weight"] / 0}), "conv.weight .* not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, words):
    weights = Other().state_dict()
    change(weights)
    torch.save(weights, tmp_path / "mine.pt")
    with pytest.raises(UserError, match=words):
        own.load(tmp_path / "mine.pt", Other)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 damaged", b"\x80\x04."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_one_sentence(tmp_path, content, suffix):
    path = tmp_path / f"mine{suffix}"
    with pytest.raises(UserError, match="There is no file"):
        own.read_weights(path)
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as weights"):
        own.read_weights(path)


def test_the_mask_is_the_zeros(networks, store):
    _, sparse = networks
    label = own.Label("mnist5k", "mine", 1, own.digest(sparse.model))
    found = own.OwnSubject(label, sparse.model, None, store).trained.masks
    assert all(torch.equal(found[name], mask) for name, mask in sparse.masks.items())
    assert own.sparsity(sparse.model) == pytest.approx(1 - masks.n_kept(found) / sum(m.numel() for m in found.values()))


def test_a_builder_is_named_by_module_and_function():
    assert own.builder("torch.nn:Identity") is nn.Identity
    for name in ("collections", "collections:nothing", "nowhere.to.be:found", ":", ""):
        with pytest.raises(UserError, match=r"package\.module:function"):
            own.builder(name)


NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 7 * 7, 10)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))
"""

GRID = """
data: mnist5k
arch: resnet8
methods: [omp]
rounds: [4]
seeds: [0]
precision: float32
dimensions:
  calibration: {n_test: 100, n_corrupted: 5, n_bootstrap: 20}
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder with a network of somebody else's, its weights in four forms, and a grid."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "theirs.py").write_text(NETWORK)
    (folder / "mine.yaml").write_text(GRID)
    scope: dict = {}
    exec(NETWORK, scope)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = scope["Net"]()
    safetensors.torch.save_file(model.state_dict(), folder / "dense.safetensors")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({**weights, "conv.weight": 0 * weights["conv.weight"]}, folder / "empty.pt")
    torch.save({**weights, "fc.bias": weights["fc.bias"] / 0}, folder / "broken.pt")
    torch.save({"conv.weight": weights["conv.weight"]}, folder / "other.pt")
    prune.l1_unstructured(model.conv, "weight", amount=0.5)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / "half.pt")
    return folder


def test_the_command_judges_networks_from_files(foreign, store):
    root = Path(own.__file__).parents[1]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "lthlib",
            "check",
            "mine.yaml",
            "dense.safetensors",
            "half.pt",
            "empty.pt",
            "--network",
            "theirs:Net",
            "--rows",
            "rows.csv",
        ],
        cwd=foreign,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "LTHLIB_STORE": str(store.root)},
    )
    assert run.returncode in (0, 2), run.stderr
    assert "half: 50.0 % of the convolution weights are zero" in run.stdout
    assert "empty: 100.0 % of the convolution weights are zero" in run.stdout
    assert run.stdout.count(" won. ") == 2
    assert (run.returncode == 0) == (run.stdout.count("LTH-PASS") == 2)
    rows = pd.read_csv(foreign / "rows.csv")
    assert set(rows["method"]) == {"dense", "half", "empty"}
    assert rows.groupby("method")["sparsity"].first().to_dict() == {"dense": 0, "half": 0.5, "empty": 1}
    assert rows["value"].notna().all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.pt"], "There is no file nowhere.pt"),
        (["broken.pt"], "fc.bias in broken.pt holds numbers that are not finite"),
        (["other.pt"], "other.pt does not fit the network: it lacks conv.bias"),
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
    assert main(["check", "mine.yaml", "dense.safetensors", *arguments, *network]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said


def test_the_command_without_a_builder_names_the_layers_that_the_grid_s_network_lacks(foreign, monkeypatch, capsys):
    monkeypatch.chdir(foreign)
    assert main(["check", "mine.yaml", "dense.safetensors", "half.pt"]) == 1
    assert "does not fit the network" in capsys.readouterr().err
