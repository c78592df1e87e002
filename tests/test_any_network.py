"""Pruning networks that are not the registry's, against what the definitions give by hand."""

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune

import lthlib
from lthlib.core.errors import UserError
from lthlib.pruning import METHODS, masks
from lthlib.pruning.any_network import apply, prune, scores, sparsity

DIRECT = ["rp", "rp-layerwise", "rp-erk", "omp", "snip", "grasp", "synflow"]


class LeNet(nn.Module):
    """A small LeNet-5: two convolutions, two linear layers, biases, no normalisation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 5), nn.Conv2d(4, 6, 3)
        self.drop, self.fc1, self.fc2 = nn.Dropout(0.0), nn.Linear(54, 20), nn.Linear(20, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, ceil_mode=True)
        return self.fc2(F.relu(self.fc1(self.drop(x.flatten(1)))))


def lenet(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return LeNet().to(dtype)


def batch(n=20, dtype=torch.float64):
    x = torch.rand(n, 1, 18, 18, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, torch.arange(n) % 4


def layers(net, *names):
    return {f"{name}.weight": net.get_submodule(name).weight for name in names}


ALL = ("conv1", "conv2", "fc1", "fc2")
KINDS = {"conv": ALL[:2], "linear": ALL[2:], "all": ALL, ("fc1.weight", "conv2.weight"): ("fc1", "conv2")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", DIRECT)
def test_exactly_as_many_of_the_weights_asked_for_stay(method, kind):
    net = lenet(torch.float32)
    found = prune(net, method, sparsity=0.7, batch=batch(dtype=torch.float32), prunable=kind)
    weights = layers(net, *KINDS[kind])
    n = sum(w.numel() for w in weights.values())
    assert {k: m.shape for k, m in found.items()} == {k: w.shape for k, w in weights.items()}
    assert masks.n_kept(found) == n - round(0.7 * n)
    assert sparsity(found) == pytest.approx(0.7, abs=1 / n)
    again = prune(net, method, sparsity=0.7, batch=batch(dtype=torch.float32), prunable=kind)
    assert all(torch.equal(m, again[k]) for k, m in found.items())


@pytest.mark.parametrize("method", DIRECT)
def test_the_network_is_left_as_it_was(method):
    net = lenet().train()
    net.drop.eval()
    net.conv1.weight.requires_grad_(False)
    F.cross_entropy(net(batch()[0]), batch()[1]).backward()
    hook = net.conv2.register_forward_hook(lambda *a: None)
    before, twin = torch.random.get_rng_state(), copy.deepcopy(net)
    gradients = {k: None if p.grad is None else p.grad.clone() for k, p in net.named_parameters()}
    prune(net, method, sparsity=0.5, batch=batch())
    scores(net, method, batch=batch(), prunable="all")
    assert torch.equal(before, torch.random.get_rng_state())
    for (name, new), (_, old) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(new, old)
        assert new.requires_grad == old.requires_grad == (name != "conv1.weight")
        assert (new.grad is None) == (gradients[name] is None)
        assert new.grad is None or torch.equal(new.grad, gradients[name])
        assert not new._backward_hooks
    assert [m.training for m in net.modules()] == [m.training for m in twin.modules()]
    assert list(net.conv2._forward_hooks) == [hook.id]
    assert not net._forward_hooks


def test_magnitude_scores_and_masks():
    net = lenet()
    found = scores(net, "omp", prunable="all")
    assert all(torch.equal(found[k], w.detach().abs()) for k, w in layers(net, *ALL).items())
    kept = prune(net, "omp", sparsity=0.9, prunable="all")
    assert min(found[k][kept[k]].min() for k in found if kept[k].any()) >= max(found[k][~kept[k]].max() for k in found)


def test_random_scores_depend_on_the_seed_alone():
    one, other = scores(lenet(seed=1), "rp", seed=3), scores(lenet(seed=2), "rp", seed=3)
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert not torch.equal(one["conv1.weight"], scores(lenet(), "rp", seed=4)["conv1.weight"])


def test_snip_scores_are_weight_times_gradient():
    net, (x, y) = lenet(), batch()
    weights = layers(net, *ALL)
    gradients = torch.autograd.grad(F.cross_entropy(net(x), y), list(weights.values()))
    found = scores(net, "snip", batch=(x, y), prunable="all")
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        torch.testing.assert_close(found[name], (weight * gradient).abs().detach())


@pytest.mark.parametrize(
    ("kind", "taking_part", "options"),
    [
        ("conv", ALL[:2], {"with_linear": False}),
        ("conv", ALL, {"reinit_linear": False}),
        ("all", ALL, {}),  # linear layers that are pruned are scored as they are
        ("linear", ALL, {}),
    ],
)
def test_grasp_scores_are_weight_times_hessian_times_gradient(kind, taking_part, options):
    net, (x, y) = lenet(), batch(9)
    order = y.argsort(stable=True)
    parts, weights = order.tensor_split(2), layers(net, *taking_part)

    def loss(*tensors):
        values = dict(zip(weights, tensors, strict=True))
        return sum(F.cross_entropy(torch.func.functional_call(net, values, x[part]) / 50.0, y[part]) for part in parts)

    tensors = tuple(w.detach() for w in weights.values())
    g = torch.autograd.functional.jacobian(loss, tensors)
    _, hg = torch.autograd.functional.hvp(loss, tensors, g)
    expected = {name: w * h for (name, w), h in zip(zip(weights, tensors, strict=True), hg, strict=True)}
    found = scores(net, "grasp", batch=(x, y), prunable=kind, temperature=50.0, **options)
    assert set(found) == set(layers(net, *KINDS[kind]))
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name])


def test_synflow_flows_through_linear_layers_too():
    """LeNet-300-100's kind of network, without biases: each layer's scores sum to R, the product of |W| between ones."""
    torch.manual_seed(0)
    sizes = (36, 30, 10, 4)
    linears = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    net = nn.Sequential(nn.Flatten(), *(layer for linear in linears for layer in (linear, nn.ReLU())))
    total = torch.ones(36).double()
    for linear in linears:
        total = linear.weight.detach().double().abs() @ total
    x = torch.rand(3, 1, 6, 6)
    found = scores(net, "synflow", batch=(x, torch.zeros(3).long()), prunable="linear")
    assert [s.sum().item() for s in found.values()] == pytest.approx([total.sum().item()] * 3)
    kept = prune(net, "synflow", sparsity=0.95, batch=(x, torch.zeros(3).long()), prunable="linear")
    assert all(mask.any() for mask in kept.values())
    with pytest.raises(UserError, match=r"no prunable weights.*'conv'.*linear"):
        prune(net, "synflow", sparsity=0.5, batch=(x, torch.zeros(3).long()))


def test_layers_without_use_score_nothing():
    net = lenet()
    net.spare = nn.Conv2d(1, 1, 3)
    for method in ("snip", "grasp", "synflow"):
        assert scores(net.double(), method, batch=batch())["spare.weight"].eq(0).all()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_masks_hold_in_training_until_they_are_let_go(make):
    net, (x, y) = lenet(), batch()
    found = prune(net, "rp", sparsity=0.8, prunable="all")
    held = apply(net, found)
    assert sparsity(net, "all") == pytest.approx(0.8, abs=1e-3)
    more = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(net.parameters(), lr=0.05, weight_decay=0.1, **more)

    def steps():
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    steps()
    weights = layers(net, *ALL)
    assert all(weights[k][~m].eq(0).all() and weights[k][m].ne(0).all() for k, m in found.items())
    held.close()
    steps()
    assert not all(weights[k][~m].eq(0).all() for k, m in found.items())


def test_a_frozen_layer_is_held_when_it_thaws():
    net, (x, y) = lenet(), batch()
    net.conv1.requires_grad_(False)
    found = prune(net, "omp", sparsity=0.8)
    apply(net, found)
    assert not net.conv1.weight.requires_grad
    net.conv1.requires_grad_(True)
    F.cross_entropy(net(x), y).backward()
    assert net.conv1.weight.grad[~found["conv1.weight"]].eq(0).all()
    assert net.conv1.weight.grad[found["conv1.weight"]].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_labels_of_any_whole_number_and_names_from_a_generator(method, dtype):
    x, y = batch()
    plain = prune(lenet(), method, sparsity=0.5, batch=(x, y), prunable=["conv1.weight", "fc1.weight"])
    names = (f"{name}.weight" for name in ("conv1", "fc1"))
    other = prune(lenet(), method, sparsity=0.5, batch=(x, y.to(dtype)), prunable=names)
    assert all(torch.equal(mask, other[name]) for name, mask in plain.items())


def test_half_precision_is_scored_in_single():
    found = scores(lenet(torch.bfloat16), "snip", batch=batch(dtype=torch.float32))
    assert {s.dtype for s in found.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("lth", "LTH trains the network again between its rounds"),
        ("rigl", "RigL moves its masks while the network trains"),
        ("filter-l1", "makes a smaller network of its own, not masks"),
        ("lth-shuffled", "starts from the masks of LTH"),
        ("dense", "Dense removes nothing"),
    ],
)
def test_methods_that_need_more_than_a_network_say_what(method, reason):
    with pytest.raises(UserError, match=rf"{reason}: describe it as a ticket") as told:
        prune(lenet(), method, sparsity=0.5)
    assert all(hasattr(lthlib, name) for name in re.findall(r"lthlib\.(\w+)", str(told.value)))
    assert set(METHODS) - set(DIRECT) >= {method}


class Two(LeNet):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "snipp"}, "Did you mean 'snip'"),
        ({"sparsity": 90}, r"Did you mean 0\.9"),
        ({"sparsity": 0.9999}, "leaves no weight to SNIP"),
        ({"batch": None}, r"SNIP needs batch=\(images, labels\)\."),
        ({"batch": (batch()[0], batch()[1][:3])}, "20 images and labels of shape"),
        ({"batch": (batch()[0], torch.rand(20, 4))}, "one whole number per image"),
        ({"batch": (batch()[0][:0], batch()[1][:0])}, "0 images and labels of shape"),
        ({"bn_mod": "eval"}, "Did you mean 'bn_mode'"),
        ({"bn_mode": "evil"}, "must be 'train' or 'eval'. Did you mean 'eval'"),
        ({"samples_per_class": 3}, "samples_per_class cannot be chosen here"),
        ({"prunable": "convs"}, "Did you mean 'conv'"),
        ({"net": Two().double()}, "returns a tuple; it must return one tensor of logits"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(change, message):
    given = {"net": lenet(), "method": "snip", "sparsity": 0.5, "batch": batch(), **change}
    with pytest.raises(UserError, match=message):
        prune(**given)


def test_weights_under_a_mask_of_torchs_are_to_be_made_permanent_first():
    net = lenet()
    torch_prune.l1_unstructured(net.conv1, "weight", amount=0.5)
    net.conv1(batch()[0])
    with pytest.raises(UserError, match=r"'conv1\.weight' is computed from other parameters.*prune\.remove"):
        prune(net, "omp", sparsity=0.5)
