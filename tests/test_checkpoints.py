"""Weights from files that foreign tools wrote: torch, torch.nn.utils, safetensors."""

import argparse
import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from lthlib.core.errors import UserError
from lthlib.networks.checkpoints import builder, load_network, read_weights

X = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, stride=2), nn.Linear(4 * 9, 10)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


class Outer(nn.Module):
    """A network whose own names begin like a wrapper's."""

    def __init__(self):
        super().__init__()
        self.model = Other()

    def forward(self, x):
        return self.model(x)


class Tied(Other):
    def __init__(self):
        super().__init__()
        self.again = nn.Linear(36, 10)
        self.again.weight = self.fc.weight


def test_a_builder_is_named_by_module_and_function():
    assert builder("torch.nn:Identity", 1, 28, 10) is nn.Identity
    for name in ("collections", "collections:nothing", "nowhere.to.be:found", ":", ""):
        with pytest.raises(UserError, match=r"package\.module:function"):
            builder(name, 1, 28, 10)


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


def inner(model):
    return {name.replace("conv.", "conv._orig_mod.module."): value for name, value in model.state_dict().items()}


def split(model):
    model = copy.deepcopy(model)
    for layer in (model.conv, model.fc):
        prune.custom_from_mask(layer, "weight", torch.ones_like(layer.weight))
    return {f"module.{name}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "written",
    [
        lambda m: {"epoch": 3, "state_dict": {f"module._orig_mod.{k}": v for k, v in m.state_dict().items()}},
        lambda m: {"model": {"net.model." + k: v for k, v in m.state_dict().items()}},
        lambda m: {"model": m.state_dict(), "model_ema": Other().state_dict()},
        lambda m: {"state_dict_ema": m.state_dict(), "epoch": 1},
        lambda m: {k: v.to_sparse() for k, v in m.state_dict().items()},
        lambda m: {**m.state_dict(), "module.conv.bias": m.conv.bias.detach()},
        averaged,
        inner,
        split,
    ],
)
@pytest.mark.parametrize("build", [Other, Outer])
def test_wrapped_weights_are_those_of_the_network(tmp_path, written, build):
    torch.manual_seed(0)
    model = Other()
    torch.save(written(model), tmp_path / "mine.pt")
    with torch.no_grad():
        torch.testing.assert_close(load_network(tmp_path / "mine.pt", build)(X), model(X))


def reparametrised(how):
    def build():
        model = Other()
        how(model.conv)
        return model

    return build


@pytest.mark.parametrize(
    "how",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
)
def test_a_builder_may_reparametrise(tmp_path, how):
    torch.manual_seed(0)
    model = reparametrised(how)().eval()
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    with torch.no_grad():
        torch.testing.assert_close(load_network(tmp_path / "mine.pt", reparametrised(how))(X), model(X))


def test_tied_weights_are_in_the_file_once(tmp_path):
    model = Tied()
    safetensors.torch.save_model(model, tmp_path / "mine.safetensors")
    found = load_network(tmp_path / "mine.safetensors", Tied)
    assert torch.equal(found.again.weight, model.fc.weight)
    assert torch.equal(found.fc.weight, model.fc.weight)
    (tmp_path / "mine.safetensors").rename(tmp_path / "mine.pt")  # the content tells, not the name
    assert torch.equal(load_network(tmp_path / "mine.pt", Tied).fc.weight, model.fc.weight)


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
            read_weights(tmp_path / name)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            lambda w: {"state_dict": w, "best": np.float64(0.9)},
            r"beside tensors it holds numpy\S*scalar|it holds numpy\S+, numpy\S*scalar",
        ),
        (lambda w: {"state_dict": w, "args": argparse.Namespace(lr=1)}, "beside tensors it holds argparse.Namespace"),
        (lambda w: {**w, 3: torch.zeros(1)}, "has the key 3 among its tensors"),
        (lambda w: {**w, 0: torch.zeros(1)}, "has the key 0 among its tensors"),
        (lambda w: {"epoch": 3}, "holds no state dict"),
        (lambda w: [w], "holds no state dict"),
        (lambda w: {k: v for k, v in w.items() if k != "fc.weight"}, "lacks fc.weight"),
        (lambda w: {**w, "fc.wieght": w["fc.weight"]}, "unknown fc.wieght"),
        (lambda w: {**w, "fc.bias": torch.zeros(3)}, r"fc.bias .* shape \(3,\)"),
        (lambda w: {**w, "conv.weight": w["conv.weight"] / 0}, "conv.weight .* not finite"),
        (lambda w: {**w, "module.fc.bias": w["fc.bias"] + 1}, "holds fc.bias twice, as fc.bias and module.fc.bias"),
    ],
)
def test_what_does_not_fit_is_named_in_one_sentence(tmp_path, content, words):
    torch.save(content(dict(Other().state_dict())), tmp_path / "mine.pt")
    with pytest.raises(UserError, match=words) as caught:
        load_network(tmp_path / "mine.pt", Other)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 damaged", b"\x80\x04."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_one_sentence(tmp_path, content, suffix):
    path = tmp_path / f"mine{suffix}"
    with pytest.raises(UserError, match="There is no file"):
        read_weights(path)
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights(path)


def test_an_archive_with_a_damaged_directory_is_one_sentence(tmp_path):
    path = tmp_path / "mine.pt"
    torch.save(Other().state_dict(), path)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02")] = 0  # a signature in the list of files; its end is sound
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a network"):
        load_network(path, Other)


def test_a_pipe_or_folder_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=words):
            read_weights(path)
