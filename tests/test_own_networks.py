"""Networks in memory, transformers, and files that hold a whole network."""

import copy
import re
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_own import taught
from torch import nn
from torch.nn.utils import prune

import lthlib
from lthlib import data, own
from lthlib.core.errors import UserError
from lthlib.networks.checkpoints import builder, load_network
from lthlib.networks.checks import check_classifier
from lthlib.networks.inputs import as_input
from lthlib.networks.layers import Normalize
from lthlib.networks.weights import used_weights
from lthlib.own.compare import _used, in_memory
from lthlib.own.report import density
from lthlib.own.subject import Label, OwnSubject
from lthlib.own.words import as_json, conclusion, status, summary

FEW = {"calibration": {"n_test": 200, "n_corrupted": 5, "n_bootstrap": 10}}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, stride=4), nn.Linear(4 * 7 * 7, 10)

    def features(self, x):
        return torch.relu(self.conv(x)).flatten(1)

    def forward(self, x):
        return self.fc(self.features(x))


class Transformer(nn.Module):
    """Patches, attention, LayerNorm, GELU."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 7, stride=7)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 1, nn.LayerNorm(32), enable_nested_tensor=False)
        self.fc = nn.Linear(32 * 16, 10)

    def features(self, x):
        return self.blocks(self.patches(x).flatten(2).transpose(1, 2)).flatten(1)

    def forward(self, x):
        return self.fc(self.features(x))


@pytest.fixture(scope="module")
def dense(store):
    torch.manual_seed(0)
    return taught(Small().eval(), store)


@pytest.fixture(scope="module")
def half(dense):
    model = copy.deepcopy(dense)
    prune.l1_unstructured(model.conv, "weight", amount=0.5)
    prune.remove(model.conv, "weight")
    return model


@pytest.fixture(scope="module")
def images(store):
    return data.load("mnist5k", store).test


def clean(rows):
    return rows[rows["shift"] == "none"].set_index(["method", "metric"])["value"]


def test_images_in_memory_give_the_numbers_of_the_same_images_by_name(dense, half, images, store, tmp_path):
    by_name = own.compare(dense, {"half": half}, "mnist5k", store=store, dimensions=FEW)
    pixels = as_input(images.pixels)
    found = lthlib.compare(dense, {"half": half}, pixels, images.labels, dimensions=FEW, store=store)
    np.testing.assert_allclose(clean(found.rows), clean(by_name.rows), rtol=1e-6)
    whole = (256 * pixels).clamp(0, 255)
    as_bytes = own.compare(dense, half, whole.to(torch.uint8), images.labels, dimensions=["calibration"], store=store)
    assert set(as_bytes.rows["method"]) == {"dense", "pruned"}
    found.save(tmp_path)
    again = own.Comparison.read(tmp_path)
    assert again.judged.to_csv() == found.judged.to_csv()
    (kept,) = tmp_path.glob("*.npz")
    whole = kept.read_bytes()
    for harm in (whole[: len(whole) // 2], whole[:200] + bytes([whole[200] ^ 255]) + whole[201:], b""):
        kept.write_bytes(harm)
        with pytest.raises(UserError, match="cannot be read"):
            own.Comparison.read(tmp_path)
    found.report(tmp_path / "report.html")
    assert re.search(r"<strong>half, 50.0 % pruned: (kept|lost|not shown)", (tmp_path / "report.html").read_text())


def test_a_network_beside_itself_loses_nothing(dense, images, store, tmp_path):
    same = {"same": copy.deepcopy(dense), "again": copy.deepcopy(dense)}
    found = own.compare(dense, same, as_input(images.pixels[::3]), images.labels[::3], dimensions=FEW, store=store)
    assert set(found.judged["method"]) == {"same", "again"}
    assert not found.judged["shortfall"].any()
    assert "lost" not in set(found.judged["outcome"])
    found.report(tmp_path / "report.html")


def test_answers_are_asked_again_where_the_images_of_a_name_are_others(dense, images, store):
    def answers(pixels, labels):
        held = replace(in_memory(pixels, labels), name="a-folder")
        return OwnSubject(Label("a-folder", "dense", 0, "0"), dense, None, store, images=held).logits("test", 200)

    pixels, labels = as_input(images.pixels[:200]), images.labels[:200]
    before, after = answers(pixels, labels), answers(pixels.flip(3), labels)
    assert not np.allclose(before, after)
    with torch.no_grad():
        np.testing.assert_allclose(after[:5], dense(pixels.flip(3)[:5]), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (2 * x - 1, y), r"from -1 to 1; pixels are uint8 or floats in \[0, 1\]"),
        (lambda x, y: ((257 * 255 * x).long(), y), "pixels are uint8, or floats"),
        (lambda x, y: (x[:, 0], y), r"\(N, C, H, H\) is needed"),
        (lambda x, y: (x, y[1:]), "one whole number"),
        (lambda x, y: (x, None), "one whole number"),
        (lambda x, y: (x, y.float()), "one whole number"),
        (lambda x, y: (x, y % 7), "7 classes, so 7 logits are needed"),
        (lambda x, y: (x.expand(-1, 3, -1, -1), y), r"cannot take images of \(3, 28, 28\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(dense, half, images, store, change, words):
    with pytest.raises(UserError, match=words):
        own.compare(dense, half, *change(as_input(images.pixels), images.labels), dimensions=FEW, store=store)


def test_a_dense_network_cannot_stand_on_the_other_side(dense, half, store):
    with pytest.raises(UserError, match="right order"):
        own.compare(half, {"mine": dense}, "mnist5k", dimensions=FEW, store=store)


def test_a_transformer_is_measured_where_that_has_a_meaning(store):
    torch.manual_seed(0)
    dense = taught(Transformer().eval(), store)
    pruned = copy.deepcopy(dense)
    attention = pruned.blocks.layers[0].self_attn
    with torch.no_grad():
        attention.in_proj_weight[:48] = 0  # half of 96
    used = used_weights(pruned, torch.rand(2, 1, 28, 28))
    assert used["blocks.layers.0.self_attn.in_proj_weight"][1].count_nonzero() == 48 * 32
    assert {"blocks.layers.0.self_attn.out_proj.weight", "blocks.layers.0.linear1.weight", "fc.weight"} <= set(used)
    few = {
        **FEW,
        "flatness": {"n_weights": 4, "n_spectrum": 4, "n_pixels": 2, "n_noise": 4, "n_path": 4, "points": 3},
        "interpretability": {"layer": "blocks", "n_images": 2, "n_masks": 20, "n_concept_images": 20, "draws": 19},
    }
    found = own.compare(dense, {"mine": pruned}, "mnist5k", dimensions=few, store=store, prunable="linear")
    total = sum(weight.numel() for kind, weight in used.values() if kind == "linear")
    assert found.rows.set_index("method").loc["mine", "sparsity"].iloc[0] == pytest.approx(48 * 32 / total)
    assert set(found.rows["dimension"]) == {"calibration", "flatness"}
    assert "dissection needs" in found.facts["not_measured"]["interpretability"]
    method = found.arrays[found.networks["mine"]]["weight_method"]
    assert str(method) != "exact"


def test_attention_over_other_sizes_has_its_three_projections_counted():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.ask, self.attend, self.fc = nn.Linear(4, 8), attention, nn.Linear(8, 3)

        def forward(self, x):  # images (N, 1, 5, 10): five places of six numbers and four
            x = x.flatten(1, 2)
            return self.fc(self.attend(self.ask(x[..., 6:]), x[..., :6], x[..., 6:], need_weights=False)[0].mean(1))

    used = used_weights(Pool().eval(), torch.rand(3, 1, 5, 10))
    names = {f"attend.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")}
    assert set(used) == {"ask.weight", "fc.weight", *names}
    assert {kind for kind, _ in used.values()} == {"linear"}


def test_layers_have_the_names_that_they_have_in_the_network_itself(dense, images):
    around = nn.Sequential(OrderedDict(normalize=Normalize([0.0], [1.0]), network=dense))
    few = as_input(images.pixels[:2])
    assert list(_used(around, few)) == list(_used(dense, few))


def test_whole_networks_from_files_answer_as_the_networks_do(dense, half, images, store, tmp_path):
    x = as_input(images.pixels[:5])
    torch.jit.script(half).save(tmp_path / "script.pt")
    torch.export.save(torch.export.export(half, (x[:1],)), tmp_path / "one.pt2")
    some = ({0: torch.export.Dim("n", min=1, max=4096)},)
    torch.export.save(torch.export.export(half, (x[:2],), dynamic_shapes=some), tmp_path / "some.pt2")
    networks = {path.stem: load_network(path) for path in sorted(tmp_path.iterdir())}
    for network in networks.values():
        torch.testing.assert_close(network.eval()(x), half(x))
    found = own.compare(dense, networks, "mnist5k", dimensions=FEW, store=store)
    assert set(found.rows.loc[found.rows["method"] != "dense", "sparsity"]) == {0.5}
    wanted = {name.removesuffix(".weight"): float((w != 0).float().mean()) for name, w in half.named_parameters()}
    for name in networks:
        assert found.facts["layers"][name] == {layer: wanted[layer] for layer in found.facts["layers"]["dense"]}
    accuracy = clean(found.rows).xs("test_accuracy", level="metric")
    assert accuracy["script"] == accuracy["one"] == accuracy["some"]
    few = {**FEW, "flatness": {"n_weights": 4}}
    found = own.compare(dense, networks["script"], "mnist5k", dimensions=few, store=store)
    assert "TorchScript gives no layers to look into" in found.facts["not_measured"]["flatness"]


class Flat(nn.Module):
    """A convolution, a place for each of its numbers, and `view`, which refuses images that lie by pixel."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.place = nn.Conv2d(3, 4, 3), nn.Linear(144, 10), nn.Parameter(torch.zeros(1, 4, 36))

    def forward(self, x):
        x = self.conv(x.view(-1, 192).view(-1, 3, 8, 8))
        return self.fc((x.reshape(-1, 4, 36) + self.place).flatten(1))


def test_a_script_says_its_weights_under_their_masks_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    net = Flat().eval()
    x = torch.rand(5, 3, 8, 8).to(memory_format=torch.channels_last)
    prune.l1_unstructured(net.fc, "weight", amount=0.75)
    with torch.no_grad():
        torch.jit.trace(net, x[:2].contiguous()).save(tmp_path / "masked.pt")
        network = load_network(tmp_path / "masked.pt").eval()
        torch.testing.assert_close(network(x), net(x.contiguous()))
    assert {name: kind for name, (kind, _) in network.used.items()} == {"conv.weight": "conv", "fc.weight": "linear"}
    assert network.used["fc.weight"][1].count_nonzero() == 1440 / 4


def test_weights_that_cannot_be_read_are_not_taken_for_pruned(dense, half, store, tmp_path):
    torch.jit.script(half).save(tmp_path / "closed.pt")
    closed = load_network(tmp_path / "closed.pt")
    closed.used = {}
    found = own.compare(dense, {"closed": closed, "half": half}, "mnist5k", dimensions=FEW, store=store)
    assert found.pruned == ["half", "closed"]
    assert found.facts["layers"]["closed"] == {} != found.facts["layers"]["half"]
    assert "closed's weights cannot be read" in found.facts["assumed"]
    assert summary(found, "closed").startswith("closed: weights cannot be read")
    assert as_json(found)["networks"]["closed"]["sparsity"] is None
    density(found)


@pytest.mark.parametrize(("each", "refused"), [(1, False), (3, False), (30, True)])
def test_the_order_of_classes_is_doubted_only_on_enough_images(each, refused):
    labels = np.repeat(np.arange(10), each)
    answers = labels.copy()
    answers[(labels >= 1) & (labels <= 3)] = np.repeat([2, 3, 1], each)  # three of ten classes are taken for others
    logits = 9.0 * np.eye(10)[answers] - 1
    if refused:
        with pytest.raises(UserError, match="classes seem to be in another order"):
            check_classifier(logits, labels, "abcdefghij")
    else:
        check_classifier(logits, labels, "abcdefghij")


def test_a_network_that_has_learned_little_is_not_said_to_have_its_classes_in_another_order():
    labels = np.repeat(np.arange(10), 100)
    answers = np.full_like(labels, 3)  # nearly all are the one class, and so are those that it takes its own for
    answers[labels == 0] = 5
    with pytest.raises(UserError, match="no better than guessing"):
        check_classifier(9.0 * np.eye(10)[answers] - 1, labels, "abcdefghij")
    answers[labels == 7] = 7
    check_classifier(9.0 * np.eye(10)[answers] - 1, labels, "abcdefghij")


def test_what_was_asked_for_and_cannot_be_measured_is_not_shown(dense, images, store, tmp_path):
    torch.jit.script(dense).save(tmp_path / "same.pt")
    same = load_network(tmp_path / "same.pt")
    wide = {"tolerance": 0.5, "relative_tolerance": 0.5}  # with so few images
    found = own.compare(dense, same, "mnist5k", dimensions=FEW, store=store, thresholds=wide)
    assert (status(found), as_json(found)["status"], found.failed) == (0, 0, [])
    (name,) = list(found.networks)[1:]
    assert "LTH-PASS" in conclusion(found, name).sentence
    more = {**FEW, "flatness": {"n_weights": 4}}
    found = own.compare(dense, same, "mnist5k", dimensions=more, store=store, thresholds=wide)
    assert (status(found), as_json(found)["networks"][name]["outcome"], found.failed) == (3, "not shown", ["flatness"])
    assert "LTH-PASS" not in conclusion(found, name).sentence
    assert "Nothing is shown of flatness" in conclusion(found, name).sentence


def test_an_onnx_file_is_asked_through_its_runtime(dense, half, images, store, tmp_path, monkeypatch):
    path = tmp_path / "half.onnx"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"install onnxruntime: pip install onnxruntime"):
        load_network(path)
    monkeypatch.undo()
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(half, (as_input(images.pixels[:1]),), str(path), dynamo=True, external_data=False)
    network = load_network(path)
    x = as_input(images.pixels[:5])
    torch.testing.assert_close(network(x), half(x), rtol=1e-4, atol=1e-4)
    few = {**FEW, "generalization": {"n_test": 100, "n_corrupted": 5, "n_ood": 20}}
    found = own.compare(dense, network, "mnist5k", dimensions=few, store=store)
    assert set(found.rows.loc[found.rows["method"] != "dense", "sparsity"]) == {0.5}
    assert "ONNX gives no gradients" in found.facts["not_measured"]["generalization"]


def test_what_is_not_a_network_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "broken.pt2").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"broken\.pt2 cannot be read as a network"):
        load_network(tmp_path / "broken.pt2")
    torch.save(Small().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="say by --network what makes"):
        load_network(tmp_path / "weights.pt")


def test_networks_of_other_libraries_are_made_for_the_images(monkeypatch):
    for name in ("torchvision:resnet18", "mobilenet_v3_small"):
        assert builder(name, 3, 32, 7)()(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="install timm: pip install timm"):
        builder("timm:resnet18", 3, 32, 7)
    monkeypatch.undo()
    pytest.importorskip("timm")
    assert builder("timm:vit_tiny_patch16_224", 3, 224, 7)()(torch.rand(1, 3, 224, 224)).shape == (1, 7)


def test_normalising_takes_away_the_mean_and_divides_by_the_deviation():
    x = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    found = Normalize(mean.tolist(), std.tolist())(x)
    torch.testing.assert_close(found, (x - mean.view(3, 1, 1)) / std.view(3, 1, 1))


def test_the_chapter_s_loops_prune_to_ninety_per_cent(dense, images):
    chapter = (Path(own.__file__).parents[2] / "book" / "own.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", chapter, flags=re.S) if "def lottery" in block)
    scope: dict = {}
    exec(code, scope)
    x, y = as_input(images.pixels[:50]), images.labels[:50]

    def train(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        return net

    pruned = [
        scope["one_shot"](copy.deepcopy(dense), train),
        scope["snip"](copy.deepcopy(dense), train, (x, y)),
        scope["lottery"](copy.deepcopy(dense), train),
    ]
    for net in pruned:
        assert int(net.conv.weight.count_nonzero()) == 4  # of 36
        assert not torch.equal(net.fc.weight, dense.fc.weight)
